"""What the formats of other tools can hold, so that a model is compressed for one and exported to it exactly."""

from __future__ import annotations

from dataclasses import dataclass

from mico.errors import UserError


@dataclass(frozen=True)
class Profile:
    """A target: one integer grid with zero on it per (row, group of consecutive channels), one width a Linear.

    widths: bits a code may take, ascending; group_sizes: channels that share a scale, the first is the default;
    whole_rows: a Linear whose input the default does not divide takes one scale a row; fused: Linears that read
    the same tensor are one matrix there and share their width.
    """

    name: str
    widths: tuple[int, ...]
    group_sizes: tuple[int, ...]
    whole_rows: bool
    fused: bool

    def group_size(self, channels: int, wanted: int | None) -> int:
        """Channels a group for a Linear of `channels` inputs. Raises UserError when there is no way."""
        size = wanted or self.group_sizes[0]
        if channels % size == 0:
            return size
        if wanted is None and self.whole_rows:
            return channels
        fitting = [str(size) for size in self.group_sizes if channels % size == 0]
        remedy = f"choose {' or '.join(fitting)}" if fitting else "no size of this profile does: use another --profile"
        if self.whole_rows:
            remedy += ", or leave --group-size out for whole rows"
        raise UserError(f"--group-size {size}: does not divide an input of {channels} channels: {remedy}")

    def check(self, wbits: int, target_avg_bits: float | None, group_size: int | None) -> None:
        """Raise UserError unless the target holds such codes and groups."""
        if wbits not in self.widths and (target_avg_bits is None or wbits == 16):
            raise UserError(f"--wbits {wbits}: --profile {self.name} holds {_list(self.widths)} bits")
        low, high = self.widths[0], self.widths[-1]
        if target_avg_bits is not None and not low <= target_avg_bits <= high:
            raise UserError(f"--target-avg-bits {target_avg_bits}: --profile {self.name} holds {low} to {high} bits")
        if group_size is not None and group_size not in self.group_sizes:
            raise UserError(f"--group-size {group_size}: --profile {self.name} has {_list(self.group_sizes)} channels")


def _list(numbers: tuple[int, ...]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if len(numbers) > 1 else map(str, numbers))


# vllm: what its compressed-tensors loader takes, and the group sizes of its Marlin kernels. gguf: Q4_0, Q5_0, Q8_0.
PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("vllm", widths=(2, 3, 4, 5, 6, 7, 8), group_sizes=(128, 64, 32), whole_rows=True, fused=True),
        Profile("gguf", widths=(4, 5, 8), group_sizes=(32,), whole_rows=False, fused=False),
    )
}
