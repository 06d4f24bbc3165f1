"""How fast every kernel is, against a dense product and against what the machine can do."""

SHAPE_NAMES = ("7b", "mini", "tiny")
FORMAT_NAMES = (
    "bf16",
    "int8",
    "int8-weight-only",
    "int8-g128",
    "int4",
    "int4-g64",
    "int4-g32",
    "int4-asymmetric",
    "fp8",
)
"""Storage formats by the name they are asked for; ``operands.FORMATS`` says what each one is."""
