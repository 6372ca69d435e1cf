"""The sequential part of `memory_scan`: from memory to memory forwards, and from gradient to gradient backwards.

Legend as there. States are [B, H, N, K, V], so that the memories of a head lie one after the other.
"""

import torch
from torch import Tensor

from new_llm.models.ops import triton as kernels
from new_llm.models.ops.memory import sum_outer_products


def find_product_dtype(k: Tensor, wide: torch.dtype) -> torch.dtype:
    """The dtype of products with memories: k's, but in float16, whose range is too small for them, the memories'."""
    return wide if k.dtype == torch.float16 else k.dtype


class Chain:
    """The writes of one call: X_{i+1} = d_i X_i + k_iᵀ (v_i − e_i k_i X_i) in the memory m_i.

    Args:
        k: features of the keys, [B, n, H, S, K].
        delta_scales: e, [B, n, H, S]; None: no delta rule.
        decay: d, [B, n, H]; None: 1.
        slots: m_i, [B, n] int64.
        num_memories: N.
        num_writes: segments that are written.
        wide: the states' dtype.
    """

    def __init__(
        self,
        k: Tensor,
        delta_scales: Tensor | None,
        decay: Tensor | None,
        slots: Tensor,
        num_memories: int,
        num_writes: int,
        wide: torch.dtype,
    ) -> None:
        self.k = k
        self.delta_scales = delta_scales
        self.decay = decay
        self.slots = slots
        self.num_memories = num_memories
        self.num_writes = num_writes
        self.wide = wide
        self.dtype = find_product_dtype(k, wide)
        fits = delta_scales is None or k.shape[-1] * k.element_size() <= kernels.MAX_KEY_BYTES
        self.uses_triton = fits and kernels.is_wanted(k)
        self.common_slots = self._find_common_slots()

    def _find_common_slots(self) -> list[int] | None:
        """m_i where it is the same in all rows and known without waiting for a device."""
        if self.num_memories == 1:
            return [0] * self.slots.shape[1]
        if self.slots.device.type == "cpu" and bool((self.slots == self.slots[:1]).all()):
            return self.slots[0].tolist()
        return None

    def begin(self, memories: Tensor | None, v: Tensor) -> Tensor:
        """A state that may be changed in place, from [B, N, H, K, V] (None: empty)."""
        batch, _, heads, _, width = self.k.shape
        if memories is None:
            return self.k.new_zeros(batch, heads, self.num_memories, width, v.shape[-1], dtype=self.wide)
        return memories.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def advance(self, state: Tensor, v: Tensor, part: slice, *, is_known: bool = False) -> tuple[Tensor, Tensor]:
        """Write the segments of a part, one after the other, into `state`.

        Args:
            state: X at the part's first segment; afterwards behind its last.
            v: values of all segments, or with `is_known` the u that was written.
            part: the segments.
            is_known: u is given, so that no product waits for another.

        Returns:
            X as each segment of the part finds it, [B, g, H, N, K, V] in the products' dtype, and u of the written
            ones, [B, w, H, S, V] in v's dtype.
        """
        written = self._written(part)
        k, u = self.k[:, written], v[:, written]
        states = state.new_empty(state.shape[0], part.stop - part.start, *state.shape[1:], dtype=self.dtype)
        is_sequential = self.delta_scales is not None and not is_known
        if self.uses_triton and k.shape[1]:
            decay, slots = self._of(self.decay, written), self.slots[:, written]
            if is_sequential:
                u = kernels.write_with_delta(state, states, self._scale_keys(written), k, u, decay, slots)
            else:
                kernels.write_sums(state, states, sum_outer_products(k, u, self.wide), decay, slots)
            states[:, k.shape[1] :] = state.unsqueeze(1)
            return states, u
        products = None if is_sequential else sum_outer_products(k, u, self.wide)
        scaled = self._scale_keys(written) if is_sequential else k
        updates: list[Tensor] = []
        for j in range(states.shape[1]):
            states[:, j] = state
            if j >= k.shape[1]:
                continue
            current = self._take(state, part.start + j)
            if products is None:
                updates.append(u[:, j] - scaled[:, j] @ current.to(self.dtype))
                product = sum_outer_products(k[:, j], updates[-1], self.wide)
            else:
                product = products[:, j]
            if self.decay is not None:
                current.mul_(self.decay[:, part.start + j, :, None, None])
            self._put(state, current.add_(product), part.start + j)
        return states, torch.stack(updates, 1) if updates else u

    def retreat(
        self,
        g: Tensor,
        states: Tensor,
        u: Tensor,
        from_reads: Tensor | None,
        part: slice,
        for_k: Tensor,
        for_v: Tensor,
        for_e: Tensor,
    ) -> None:
        """The way back: u'_i = k_i G_{i+1}, G_i = d_i G_{i+1} − (e_i k_i)ᵀ u'_i + what the reads of X_i give.

        Args:
            g: G = ∂L/∂X behind the part; afterwards at its first segment.
            states: what `advance` returned.
            u: what was written, of all segments.
            from_reads: ∂L/∂X of the reads, of the part's last segments.
            part: the segments.
            for_k: takes ∂L/∂k, [B, n, H, S, K].
            for_v: takes ∂L/∂v, [B, n, H, S, V].
            for_e: takes ∂L/∂e, [B, n, H, S].
        """
        written = self._written(part)
        num_segments, num_writes = part.stop - part.start, written.stop - written.start
        num_unread = num_segments - (0 if from_reads is None else from_reads.shape[1])
        k, u = self.k[:, written].to(self.dtype), u[:, written].to(self.dtype)
        scaled = None if self.delta_scales is None else self._scale_keys(written)
        above = states.new_empty(g.shape[0], num_writes, g.shape[1], *g.shape[3:])  # G_{i+1} of the written memory
        if self.uses_triton and num_writes:
            back = self._retreat_by_kernels(g, above, k, scaled, from_reads, written, num_unread)
            self._differentiate_writes(k, u, back, above, states, written, for_k, for_v, for_e)
            return
        backs: list[Tensor] = []  # u'
        for j in reversed(range(num_segments)):
            if j < num_writes:
                current = self._take(g, part.start + j)
                above[:, j] = current
                if self.decay is not None:
                    current.mul_(self.decay[:, part.start + j, :, None, None])
                if scaled is not None:
                    backs.append(k[:, j] @ above[:, j])
                    current.sub_(scaled[:, j].transpose(-1, -2) @ backs[-1])
                if self.decay is not None or scaled is not None:
                    self._put(g, current, part.start + j)
            if from_reads is not None and j >= num_unread:
                g.add_(from_reads[:, j - num_unread])
        if num_writes:
            back = k @ above if scaled is None else torch.stack(backs[::-1], 1)
            self._differentiate_writes(k, u, back, above, states, written, for_k, for_v, for_e)

    def _retreat_by_kernels(
        self,
        g: Tensor,
        above: Tensor,
        k: Tensor,
        scaled: Tensor | None,
        from_reads: Tensor | None,
        written: slice,
        num_unread: int,
    ) -> Tensor:
        """u' of the written segments; `g` and `above` as in `retreat`."""
        num_writes = k.shape[1]
        added = None
        if from_reads is not None:
            last = from_reads.shape[1] + num_unread - num_writes  # segments behind the last write
            g.add_(from_reads[:, from_reads.shape[1] - last :].sum(1))
            added = from_reads[:, : from_reads.shape[1] - last]
            added = added if added.shape[1] else None
        decay, slots = self._of(self.decay, written), self.slots[:, written]
        options = {"added": added, "num_unread": num_unread}
        if scaled is not None:
            return kernels.write_with_delta(g, above, k, scaled, None, decay, slots, **options)
        kernels.write_sums(g, above, None, decay, slots, **options)
        return k @ above

    def _differentiate_writes(
        self,
        k: Tensor,
        u: Tensor,
        back: Tensor,
        above: Tensor,
        states: Tensor,
        written: slice,
        for_k: Tensor,
        for_v: Tensor,
        for_e: Tensor,
    ) -> None:
        """What follows from u' (`back`) and G (`above`) of the written segments, for all of them at once."""
        for_v[:, written] = back
        into_k = u @ above.transpose(-1, -2)
        if self.delta_scales is not None:
            from_states = (back @ self._pick(states, written).transpose(-1, -2)).to(self.wide)
            into_k = into_k - from_states * self.delta_scales[:, written].unsqueeze(-1)
            for_e[:, written] = -(from_states * k).sum(-1)
        for_k[:, written] = into_k

    def _written(self, part: slice) -> slice:
        return slice(part.start, max(part.start, min(part.stop, self.num_writes)))

    @staticmethod
    def _of(t: Tensor | None, part: slice) -> Tensor | None:
        return None if t is None else t[:, part]

    def _scale_keys(self, part: slice) -> Tensor:
        """e k of some segments, in the products' dtype."""
        assert self.delta_scales is not None
        return (self.k[:, part].to(self.wide) * self.delta_scales[:, part].unsqueeze(-1)).to(self.dtype)

    def _take(self, state: Tensor, i: int) -> Tensor:
        """The memory of `state` that segment i is written to, [B, H, K, V]: a view where all rows have the same."""
        if self.common_slots is not None:
            return state[:, :, self.common_slots[i]]
        return state[torch.arange(state.shape[0], device=state.device), :, self.slots[:, i]]

    def _put(self, state: Tensor, current: Tensor, i: int) -> None:
        if self.common_slots is None:
            state[torch.arange(state.shape[0], device=state.device), :, self.slots[:, i]] = current

    def _pick(self, states: Tensor, written: slice) -> Tensor:
        """The written memory's states, [B, w, H, K, V]."""
        num_writes = written.stop - written.start
        if self.num_memories == 1:
            return states[:, :num_writes, :, 0]
        rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
        steps = torch.arange(num_writes, device=states.device)
        return states[rows, steps, :, self.slots[:, written]]
