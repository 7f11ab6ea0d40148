"""A model of PyTorch's CUDA caching allocator: what a series of allocations takes from a card."""

from __future__ import annotations

from bisect import bisect_left, insort

# Constants of c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp.
_BLOCK_BYTES = 512  # kMinBlockSize
_SMALL_BYTES = 2**20  # kSmallSize: requests up to here come from small segments
_SMALL_SEGMENT_BYTES = 2 * 2**20  # kSmallBuffer
_LARGE_SEGMENT_BYTES = 20 * 2**20  # kLargeBuffer
_LARGE_REQUEST_BYTES = 10 * 2**20  # kMinLargeAlloc: from here on a segment is the request
_ROUND_BYTES = 2 * 2**20  # kRoundLarge
_ADDRESS_BYTES = 20 * 2**50  # address space of an expandable segment: more than any card, in pages


class _Block:
    """A part of a segment; neighbours are linked in the order of addresses."""

    __slots__ = ("address", "after", "before", "free", "mapped", "nbytes", "small")

    def __init__(self, address: int, nbytes: int, *, small: bool, mapped: bool = True) -> None:
        self.address, self.nbytes, self.small, self.mapped = address, nbytes, small, mapped
        self.free = False
        self.before: _Block | None = None
        self.after: _Block | None = None

    def cut(self, nbytes: int) -> _Block:
        """Keep the first `nbytes`; the rest as a new block behind this one."""
        rest = _Block(
            self.address + nbytes, self.nbytes - nbytes, small=self.small, mapped=self.mapped
        )
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.after, self.nbytes = rest, nbytes
        return rest

    def swallow(self, after: _Block) -> None:
        """Take in the block behind this one."""
        self.nbytes += after.nbytes
        self.after = after.after
        if self.after is not None:
            self.after.before = self


class CachingAllocator:
    """One device, one stream: best fit in two pools, blocks split and merged.

    Args:
        limit_bytes: Most bytes of all segments; unlimited if `None`.
        expandable: Whether each pool is one segment that grows at its end.
        ascending: Whether each new segment lies above the one before, not below. Of free blocks of
            one size the allocator takes that of the lowest address.
    """

    def __init__(
        self,
        *,
        limit_bytes: int | None = None,
        expandable: bool = False,
        ascending: bool = False,
    ) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self._limit_bytes = limit_bytes
        self._expandable = expandable
        self._used: dict[int, _Block] = {}
        # Free blocks by pool (small or not), as (bytes, address), smallest first.
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._at: dict[int, _Block] = {}  # free blocks by address
        self._unmapped: dict[bool, list[_Block]] = {
            small: [_Block(base, _ADDRESS_BYTES, small=small, mapped=False)] if expandable else []
            for small, base in ((True, 0), (False, _ADDRESS_BYTES))
        }
        self._ascending = ascending
        self._bottom = self._top = _ADDRESS_BYTES

    def malloc(self, key: int, nbytes: int) -> bool:
        """Allocate `nbytes` under `key`; whether there was room."""
        if nbytes <= 0:
            return True
        size = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
        small = size <= _SMALL_BYTES
        block = self._find(size, small) or self._grow(size, small)
        if block is None:
            self.release_cached()
            block = self._find(size, small) or self._grow(size, small)
            if block is None:
                return False
        self._take(block)
        rest = block.nbytes - size
        if rest >= _BLOCK_BYTES if small or self._expandable else rest > _SMALL_BYTES:
            self._put(block.cut(size))
        self._used[key] = block
        self.allocated_bytes += block.nbytes
        return True

    def free(self, key: int) -> None:
        """Free what `key` holds; nothing for a key of 0 bytes."""
        block = self._used.pop(key, None)
        if block is None:
            return
        self.allocated_bytes -= block.nbytes
        self._put_merged(block)

    def release_cached(self) -> None:
        """Give wholly free segments, and free pages of expandable ones, back to the device."""
        for blocks in self._free.values():
            for _, address in list(blocks):
                block = self._at[address]
                if self._expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    self._take(block)
                    self.reserved_bytes -= block.nbytes

    def _find(self, size: int, small: bool) -> _Block | None:
        blocks = self._free[small]
        index = bisect_left(blocks, (size, -1))
        return self._at[blocks[index][1]] if index < len(blocks) else None

    def _put(self, block: _Block) -> None:
        insort(self._free[block.small], (block.nbytes, block.address))
        self._at[block.address] = block
        block.free = True

    def _take(self, block: _Block) -> None:
        blocks = self._free[block.small]
        del blocks[bisect_left(blocks, (block.nbytes, block.address))]
        del self._at[block.address]
        block.free = False

    def _put_merged(self, block: _Block) -> _Block:
        after, before = block.after, block.before
        if after is not None and after.free:
            self._take(after)
            block.swallow(after)
        if before is not None and before.free:
            self._take(before)
            before.swallow(block)
            block = before
        self._put(block)
        return block

    def _grow(self, size: int, small: bool) -> _Block | None:
        return self._extend(size, small) if self._expandable else self._segment(size, small)

    def _reserve(self, nbytes: int) -> bool:
        reserved = self.reserved_bytes + nbytes
        if self._limit_bytes is not None and reserved > self._limit_bytes:
            return False
        self.reserved_bytes = reserved
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved)
        return True

    def _segment(self, size: int, small: bool) -> _Block | None:
        if small:
            nbytes = _SMALL_SEGMENT_BYTES
        elif size < _LARGE_REQUEST_BYTES:
            nbytes = _LARGE_SEGMENT_BYTES
        else:
            nbytes = -(-size // _ROUND_BYTES) * _ROUND_BYTES
        if not self._reserve(nbytes):
            return None
        block = _Block(self._place(nbytes), nbytes, small=small)
        self._put(block)
        return block

    def _place(self, nbytes: int) -> int:
        if self._ascending:
            self._top += nbytes
            return self._top - nbytes
        self._bottom -= nbytes
        return self._bottom

    def _extend(self, size: int, small: bool) -> _Block | None:
        """Map pages where free and unmapped blocks in a row have room, lowest address first."""
        for hole in sorted(self._unmapped[small], key=lambda block: block.address):
            start = hole.before if hole.before is not None and hole.before.free else hole
            room = 0
            block: _Block | None = start
            while block is not None and room < size and (block.free or not block.mapped):
                room += block.nbytes
                block = block.after
            if room >= size:
                return self._map(start, size)
        return None

    def _map(self, block: _Block, size: int) -> _Block | None:
        page = _SMALL_SEGMENT_BYTES if block.small else _LARGE_SEGMENT_BYTES
        if not block.mapped:
            block = self._map_start(block, -(-size // page) * page) or block
        while block.mapped and block.nbytes < size:
            missing = size - block.nbytes
            hole = block.after
            if hole is None or hole.mapped:
                return None
            grown = self._map_start(hole, -(-missing // page) * page)
            if grown is None:
                return None
            block = grown
        return block if block.mapped else None

    def _map_start(self, hole: _Block, nbytes: int) -> _Block | None:
        """The free block that holds the first `nbytes` of an unmapped one, now mapped."""
        nbytes = min(nbytes, hole.nbytes)
        if not self._reserve(nbytes):
            return None
        self._unmapped[hole.small].remove(hole)
        if hole.nbytes > nbytes:
            self._unmapped[hole.small].append(hole.cut(nbytes))
        hole.mapped = True
        return self._put_merged(hole)

    def _unmap(self, block: _Block) -> None:
        page = _SMALL_SEGMENT_BYTES if block.small else _LARGE_SEGMENT_BYTES
        start = -(-block.address // page) * page
        end = (block.address + block.nbytes) // page * page
        if end <= start:
            return
        self._take(block)
        hole = block
        if start > block.address:
            hole = block.cut(start - block.address)
            self._put(block)
        if hole.nbytes > end - start:
            self._put(hole.cut(end - start))
        hole.mapped = False
        self.reserved_bytes -= hole.nbytes
        holes = self._unmapped[hole.small]
        if hole.after is not None and not hole.after.mapped:
            holes.remove(hole.after)
            hole.swallow(hole.after)
        if hole.before is not None and not hole.before.mapped:
            hole.before.swallow(hole)
        else:
            holes.append(hole)
