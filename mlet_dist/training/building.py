"""From a job to what it trains: the sharded model, its optimizer, and where a checkpoint left them."""

import torch
from torchrec.distributed import DistributedModelParallel

from mlet_dist.models.dlrm import build_dlrm
from mlet_dist.training.job import Job
from mlet_dist.training.metrics import BinaryMetrics
from mlet_dist.training.model_plan import ModelPlan, describe_plan
from mlet_dist.training.optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.schedule import schedule_warnings
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.snapshot import restore
from mlet_dist.training.state import Training

_PROGRESS_BINS = 1 << 16


def build_model(job: Job) -> tuple[DistributedModelParallel, ModelPlan]:
    """The model over all ranks, with initial values, and the plan, which is shown and saved. A collective call.

    Raises:
        UserError: no plan fits, or none is what was asked.
    """
    rows_dtypes = job.config.sharding.rows_dtypes([feature.name for feature in job.spec.sparse])
    model = build_dlrm(job.spec, torch.device("meta"), rows_dtypes)
    fuse_row_optimizer(model, job.config.optimizer)
    sharded, plan = shard_model(model, job.worker, job.local_batch_size, job.config.sharding, job.spec.pooling_factors)
    if job.worker.is_first:
        job.run.save_plan(plan.entries(), job.worker.world_size)
    job.say(f"plan  {line}" for line in describe_plan(plan))
    return sharded, plan


def begin_training(job: Job, model: DistributedModelParallel) -> Training:
    """The run as this job takes it up: from the beginning, on given weights, or from its checkpoint. A collective call.

    Raises:
        UserError: the checkpoint does not fit the model, or cannot be read.
    """
    job.say(f"warning: {warning}" for warning in schedule_warnings(job.config.optimizer, job.steps))
    training = Training(
        model,
        build_optimizer(model, job.config.optimizer),
        BinaryMetrics(job.worker.device, _PROGRESS_BINS),
        steps=job.steps,
        batches_per_epoch=len(job.loader),
    )
    if job.start is not None:
        restore(training, job.start.found)
    elif job.initial is not None:
        job.initial.load(model)
    return training
