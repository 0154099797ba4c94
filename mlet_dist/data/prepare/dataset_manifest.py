"""The merge pass: it adds vocabularies, ``quarantine.jsonl``, ``schema.json`` and ``manifest.json`` to the parts.

The manifest records what the data set was made from, and a checksum of each file that the schema does not list.
"""

import dataclasses
import hashlib
import json
import shutil

from mlet_dist import __version__
from mlet_dist.data.label_classes import check_classes
from mlet_dist.data.parquet_parts import sha256_of
from mlet_dist.data.prepare.pass_results import PassResults
from mlet_dist.data.prepare.recorded_description import to_record
from mlet_dist.data.prepare.work_files import save_json
from mlet_dist.data.preprocessing import Preprocessing, dense_rules, label_rules, sparse_rules
from mlet_dist.data.schema import FILE_NAME, MANIFEST, QUARANTINE, VOCABULARY, DatasetSchema, SparseFeature
from mlet_dist.formatting import with_checksum


def assemble(passes: PassResults) -> DatasetSchema:
    """Complete the data directory of finished passes with vocabularies, quarantine, schema and manifest.

    Raises:
        UserError: a pass is not finished, or all rows of the training split have the same label.
    """
    data, spec, like = passes.data, passes.spec, passes.like
    schema = _schema(passes)  # before any change, since it raises if a pass is not finished
    check_classes(passes.files[0].path, schema, ["train"])
    (data / VOCABULARY).mkdir(exist_ok=True)
    for made in passes.vocabularies:
        shutil.copyfile(made, data / VOCABULARY / made.name)  # not moved, since other arguments may reuse it
    lines = [
        json.dumps({"file": file.path, **dataclasses.asdict(example)})
        for file, read in zip(passes.files, passes.reads, strict=True)
        for example in read.examples
    ]
    (data / QUARANTINE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    schema.save(data)
    files = [FILE_NAME, QUARANTINE, *sorted(f"{VOCABULARY}/{path.name}" for path in (data / VOCABULARY).iterdir())]
    save_json(
        data / MANIFEST,
        with_checksum(
            {
                "mlet_dist": __version__,
                "source": spec.source,
                "arguments": to_record(spec),
                **({} if like is None else {"like": {"data_set": like.path, "grow": like.grows}}),
                "inputs": [
                    {
                        "path": file.path,
                        "bytes": file.size,
                        "lines": read.lines,
                        "rows": sum(read.chunk_rows),
                        "malformed": read.malformed,
                    }
                    for file, read in zip(passes.files, passes.reads, strict=True)
                ],
                "rows": schema.rows,
                "positive_rate": schema.positive_rate,
                "malformed": schema.malformed,
                "num_embeddings": schema.num_embeddings,
                "standardised": {
                    name: {"mean": scale.mean, "deviation": scale.deviation} for name, scale in passes.scales.items()
                },
                "files": {
                    name: {"bytes": (data / name).stat().st_size, "sha256": sha256_of(data / name)} for name in files
                },
            }
        ),
    )
    return schema


def _schema(passes: PassResults) -> DatasetSchema:
    spec, parts = passes.spec, passes.parts
    train = sum(counts.rows["train"] for counts in passes.counts)
    features = []
    digest = hashlib.sha256()
    for sparse in spec.sparse:
        digest.update(f"{sparse.name} {passes.mapping_fingerprint(sparse.name)}\n".encode())
        pooling = 1.0
        if sparse.multi_valued and train:
            pooling = sum(counts.values[sparse.name] for counts in passes.counts) / train
        elif sparse.multi_valued and passes.like is not None:
            pooling = passes.like.pooling_factor(sparse.name)
        size = passes.num_embeddings(sparse.name)
        table = sparse.table or ""
        features.append(SparseFeature(sparse.name, size, sparse.multi_valued, sparse.weighted, pooling, table))
    vocabulary_id = digest.hexdigest()
    return DatasetSchema(
        source=spec.source,
        label=spec.label.column_name,
        more_labels=tuple(label.column_name for label in spec.more_labels),
        dense=tuple(dense.name for dense in spec.dense),
        sparse=tuple(features),
        malformed=sum(read.malformed for read in passes.reads),
        parts=parts,
        preprocessing=_preprocessing(passes),
        vocabulary_id=vocabulary_id,
        sample_weight=spec.sample_weight is not None,
        id_counts=passes.id_counts,
        extends=() if passes.like is None else passes.like.extended_sets(vocabulary_id),
    )


def _preprocessing(passes: PassResults) -> Preprocessing:
    spec = passes.spec
    statistics = {name: {"mean": each.mean, "deviation": each.deviation} for name, each in passes.scales.items()}
    return Preprocessing(
        label=label_rules(spec.label),
        more_labels={label.column_name: label_rules(label) for label in spec.more_labels},
        dense={dense.name: dense_rules(dense, **statistics.get(dense.name, {})) for dense in spec.dense},
        sparse={
            sparse.name: sparse_rules(sparse, passes.mapping_fingerprint(sparse.name), passes.extends(sparse.name))
            if sparse.encoding == "vocabulary"
            else sparse_rules(sparse, None)
            for sparse in spec.sparse
        },
    )
