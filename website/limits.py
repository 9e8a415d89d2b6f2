"""How much faster a language model can get, at most: bytes at batch 1, products at prefill.

    python -m website.limits

Nominal figures of the makers. The model is Llama-3-8B's shape in 16 bits: a token reads all weights
but the embedding's, and seven layers in each of 32 blocks are factored.
"""

from __future__ import annotations

from dataclasses import dataclass

READ = 7.504e9  # parameters that a token reads
TARGETS = 6.979e9  # of them in the layers that are factored
LAYERS = 7 * 32  # each is one product more when it is factored
BYTES = 2


@dataclass(frozen=True)
class Device:
    """
    Attributes:
        bandwidth: bytes per second.
        flops: of 16-bit matrix products, dense; None where no figure is to be had.
        launch: seconds that one product more costs.
    """

    name: str
    bandwidth: float
    flops: float | None
    launch: float


DEVICES = (
    Device("H200", 4.8e12, 989e12, 2e-6),
    Device("A100, 80 GB", 2.04e12, 312e12, 2e-6),
    Device("GeForce RTX 4090", 1.008e12, 165e12, 2e-6),
    Device("Jetson AGX Orin", 204.8e9, None, 2e-6),
    Device("desktop, two channels of DDR5-5600", 89.6e9, None, 0.0),
)


def speedup(keep: float, device: Device, *, launches: bool = True) -> float:
    """The most that one request at a time can gain, at this kept share of the targets."""
    dense = READ * BYTES / device.bandwidth
    factored = (READ - (1 - keep) * TARGETS) * BYTES / device.bandwidth
    return dense / (factored + (LAYERS * device.launch if launches else 0.0))


def ridge(device: Device) -> int | None:
    """The rank below which a product with `up` waits for memory, however many the tokens are."""
    return None if device.flops is None else round(device.flops / device.bandwidth)


def table() -> str:
    """By device, in Markdown."""
    lines = [
        "| device | GB/s | ms a token, dense | keep 0.8 | keep 0.5 | rank of the ridge |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for device in DEVICES:
        dense = READ * BYTES / device.bandwidth * 1e3
        gains = " | ".join(f"{speedup(keep, device):.2f} ×" for keep in (0.8, 0.5))
        lines.append(
            f"| {device.name} | {device.bandwidth / 1e9:,.0f} | {dense:.1f} | {gains} | "
            f"{ridge(device) or '–'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
