"""Checkpoints with torch.distributed.checkpoint: sharded in, resharded out; whole and marked so, or ignored.

A checkpoint is a directory ``step-00000040`` of a ``CheckpointStore``:

    .incomplete       is there from before the first byte until after the manifest
    __0_0.distcp …    tensors, a file a rank
    .metadata         names, shapes, and where in the files they are
    manifest.json     step, config, data cursor, versions, size and checksum of each file; it marks the checkpoint whole

Where both .incomplete and manifest.json are missing, the checkpoint is damaged.
"""
