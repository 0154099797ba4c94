"""Training: from a config to a checkpoint and a summary. Start at `trainer.py`.

One run, from top to bottom:
    trainer: a whole run, and its loop with everything that happens between two steps.
    step: one step, in a plain loop or in TorchRec's pipeline: forward, backward, update.
    state: the state that changes with every step.

Before the first step:
    process_group, lost_ranks: joins the ranks; which of them are missing when a collective fails.
    rank_files: what a rank records about its process for its launcher.
    job, run_directory: the data, the locked run directory and where the job starts.
    run_checkpoints: the checkpoint of a run that other commands read.
    attempts, run_seal: a job that is started again; checksums that tie the files of a run to it.
    resume, warm_start: the checkpoint to resume from; weights for a new run.
    source_inputs, refitted_tables: their inputs, compared with the model's; their rows, where the model has others.
    sharding, model_plan: shards the model; the plan, its costs and reasons.
    fused_optimizers, schedule: fuses the update of W1's rows into backward; the other optimizers; learning rates.

Between two steps:
    non_finite_guard: losses and gradients that are not finite: stop, skip or roll back.
    validation, validation_state: metrics of the split valid, the best step and the end of a run that finds no better.
    reporting, timing: metrics.jsonl, TensorBoard and the progress line; the times of a step's parts.
    trackers, tracked_run, mlflow_tracker, wandb_tracker: MLflow and W&B, which read metrics.jsonl.
    checkpoint_schedule, snapshot, signals: when to save, what to save, and signals that ask the run to stop.

After the last step:
    evaluation: predictions and metrics of a split.
    summary_faults: what the summary of a finished run says went wrong.
    binary_metrics, label_metrics: AUC and LogLoss of a label; of each label of a model.
"""
