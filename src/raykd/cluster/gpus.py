"""GPU types by the names that Ray gives them, with their memory."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    kind: str
    """As Ray names it."""
    bytes: int
    """As PyTorch tells them."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bfloat16, as NVIDIA's do from Ampere on."""
        return self.kind not in ("T4", "V100")


# What PyTorch and vLLM report as a GPU's total capacity, in GiB; where drivers differ, the least. Names are Ray's
# (`accelerator_type:...`); it tells no A100 of 40 GB from one of 80, so that `A100` is the smaller.
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
