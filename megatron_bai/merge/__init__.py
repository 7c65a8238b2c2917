"""Merge checkpoints: Balanced Actor Initialization and other methods, on `torch_dist` and Hugging Face safetensors.

No model is built and no GPU is needed. Memory is bounded: tensors are streamed from the sources to the result.

    sources (checkpoint/)                 recipe/ and tensor_names/                         results (checkpoint/)

    base      TensorInfo ── Chunk ─┐     make_plan: one fate for each tensor
    member 1  TensorInfo ── Chunk ─┤       OutputTensor ── Region [fate, coefficients]
    member 2  RenamedView ─────────┤         └── item (Region, Box) ── WorkUnit ── journal
              │ canonical boxes    │
              └ base's names ↔     │     execution/
                member's own       │       rank: its units → thread: an item → tile by tile
                                   │         read_inputs ─→ Recipe ─→ round to dtype
    Record: bytes of a chunk ──────┘         (CRC-32 of each byte range, verified)
                                                       │
                                                       └─→ ItemWriter ─→ item in a file ─→ commit
                                                           (CRC-32)      in the staging    manifest.json,
                                                                         directory         provenance.json

    1. open      every source's index is read; no tensor data (`checkpoint.formats.open_checkpoint`)
    2. plan      names are matched, each tensor gets a fate, regions are split into items and units (`recipe.plan`)
    3. measure   methods with `stats_passes` read slices as a whole: angles, thresholds (`execution.slice_stats`)
    4. merge     items are read, merged, rounded and written, a unit at a time (`execution.executor`, `execution.tiles`)
    5. verify    records read have the CRC-32 they were saved with; a sample of the result has the values of the
                 method's plain formula (`execution.verify`)
    6. commit    provenance and manifest are written, the staging directory becomes the target (`checkpoint.atomic_dir`)

Glossary:
    tensor     a global tensor under its key, however it was sharded
    chunk      a box of a tensor that is one entry of a checkpoint
    record     the contiguous bytes of a chunk's elements in a file; a byte range is a part of it
    item       a chunk's or an object's bytes in an output file; a thread merges an item, or a batch of small ones
    object     an entry that is no tensor (`_extra_state`), copied from the base
    box        (offsets, sizes) in a tensor, in elements
    region     a box of an output tensor with one fate and one set of coefficients
    slice      what one layer or one expert owns of a canonical tensor; methods measure slices
    unit       items and objects that one rank writes and the journal records together
    tile       a box that is computed in one step and fits the cache

    base       the pretrained checkpoint, or the first member: gives layout, objects and padding
    member     another checkpoint; a source is any of them, an input one whose values are needed
    recipe     a method with its settings; its terms give each source a coefficient
    result     one merged checkpoint; a sweep has several
    canonical  of a name or tensor: one for each kind of parameter, layers and experts stacked
"""
