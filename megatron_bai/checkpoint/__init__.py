"""Read, write and verify checkpoints of both formats: Megatron-Core's `torch_dist` and Hugging Face safetensors.

A checkpoint's tensor is the union of its chunks, whatever layout wrote them:

    tensor    global, under its key: [layers, experts, rows, columns]
      chunk   a box of it (offsets, sizes), one entry of the index
    file      item | item | item | …
      item    head | record | tail: one chunk with what the format puts around it. safetensors has no head or tail
      record  the chunk's elements, contiguous bytes, whose CRC-32 the format (`torch_dist`) or the manifest has

    formats        `open_checkpoint` chooses the reader
      not_checkpoints        what a path is that has neither format, in a line
      weight_checks          plain numbers, and an output layer
    reader         any box of any tensor, verified while it is read
      torch_dist, hf_files   the two formats: reader and writer of each
      tensor_index, boxes    what an index says, and its geometry
      record_crcs            the CRC-32 of records that several threads and ranks read
    writer         what a format does to write a checkpoint in units, on any ranks
    manifest       files of a complete checkpoint with their CRC-32, written last
      atomic_dir   how a complete directory replaces the one before
    safe_unpickle, torch_zip   pickles and archives of torch, read without running what they name
"""
