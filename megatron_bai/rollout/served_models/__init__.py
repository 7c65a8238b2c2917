"""Models that a server on a CPU finds without importing all that SGLang has.

SGLang 0.5.21 imports some 240 modules, and Megatron-Core with one of them, to find the model that a checkpoint names.
It reads the package that SGLANG_EXTERNAL_MODEL_PACKAGE names first, and the others only when the model is not there.
"""

SERVED_MODULE = "MEGATRON_BAI_SERVED_MODEL"  # the environment's variable that says which of SGLang's modules has it
