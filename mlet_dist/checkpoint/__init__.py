"""Checkpoints in the format of torch.distributed.checkpoint (DCP), saved and loaded under any sharding.

A checkpoint is a directory ``step-00000040`` of a ``CheckpointStore``:

    .incomplete       exists from before the first byte is written until after the manifest is written
    __0_0.distcp …    tensors, one file per rank
    .metadata         names, shapes and file positions of the tensors
    manifest.json     step, config, data cursor, versions, size and checksums of each file

It is complete once ``manifest.json`` exists. With ``.incomplete`` alone it is unfinished and ignored; with neither file
it is damaged. The modules of this package:

    store.py          where checkpoints are stored: a directory or a URL
    manifest.py       contents, writing and parsing of ``manifest.json``; checksums
    saver.py          saving in a thread; retention
    host_copy.py      what is written: a copy in host memory, or the state in small chunks
    writer.py         writes one checkpoint from all ranks
    load.py           finds a complete checkpoint and loads it
    verified_load.py  loads a checkpoint and verifies what it reads
    checked_file.py   reads parts of a file and verifies their checksums
    long_work.py      work that takes ranks different times
    tensor_ranges.py  reads ranges of rows without a model or a process group
"""
