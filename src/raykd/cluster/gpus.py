"""GPU types by Ray's names, with their memory."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A type of GPU."""

    kind: str
    """Name in Ray's resource `accelerator_type:NAME`."""
    bytes: int
    """Total memory as PyTorch reports it."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether the GPU supports bfloat16, as NVIDIA's do since Ampere."""
        return self.kind not in ("T4", "V100")


# Total memory in GiB as PyTorch and vLLM report it; the least where drivers differ. Ray names A100s of both sizes
# `A100`, which therefore has the memory of the smaller one here.
GPUS = {
    kind: Gpu(kind, int(gib * GIB))
    for kind, gib in {
        "T4": 14.56,
        "V100": 15.77,
        "L4": 21.95,
        "A10G": 21.98,
        "A100-40G": 39.38,
        "A100": 39.38,
        "L40S": 44.39,
        "H100": 79.10,
        "A100-80G": 79.14,
        "RTX-PRO-6000": 94.9,
        "H20": 95.0,
        "H200": 139.7,
        "B200": 178.0,
    }.items()
}
