"""How the programs of one launch exchange data step by step: arrivals on a counter in global memory, and a wait for it.

    wait(counter, n * t)           # all n programs of the group have written step t - 1
    h = load_shared(...)
    tl.store(...)                  # this program's part of step t
    arrive(counter)

A group of programs has a counter of its own: int32, zero (or what `target` counts from) at launch, never reset in
between. It may wrap around; only the difference to the target matters. One wait a step orders two steps: what is
written in step t may take the place of what was read in step t - 1, not of what is read in step t. All programs of a
group have to be resident at once, hence launched with launch_cooperative_grid=True.

Why the data is there after the wait, in the terms of the PTX memory model: bar.sync orders what every thread of the
writing program did before it before thread 0's red.release, whose arrival thread 0 of the reader observes with
ld.acquire, in the same scope (gpu), directly or by way of the arrivals that were added to it; then bar.sync orders
this before what the other threads of the reader do. Causality order is transitive, so release and acquire by one
thread are enough for all; it takes in earlier reads, too, so their memory may be written anew.

The compiler moves no access to memory across a barrier or across assembly that is declared impure and to clobber
memory. The barriers are needed for this, too: Triton's pipelining of loops looks at them but not at the assembly, and
would load the next step's operands ahead of the wait.

The interpreter runs other code (INTERPRETED): it can show that arrivals and targets match, not the order in which
a GPU's memory sees them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnattn.kernels.math import INTERPRETED


@triton.jit
def arrive(counter):
    """Adds one to the counter once all threads of this program have done what stands before."""
    tl.debug_barrier()
    if INTERPRETED:
        tl.atomic_add(counter, 1, sem="release")
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first red.release.gpu.global.add.u32 [$1], 1;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,~{memory}",
            [counter],
            dtype=tl.int32,  # an output there has to be
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait(counter, target):
    """Until the counter has reached the target; no thread of this program goes on before. Target: int32."""
    if INTERPRETED:
        while tl.atomic_add(counter, 0, sem="acquire") - target < 0:
            pass
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred other, behind;
                .reg .u32 thread, value;
                mov.u32 thread, %tid.x;
                setp.ne.u32 other, thread, 0;
                @other bra done;
            poll:
                ld.acquire.gpu.global.u32 value, [$1];
                sub.u32 value, value, $2;
                setp.lt.s32 behind, value, 0;
                @behind bra poll;
            done:
                mov.u32 $0, 0;
            }
            """,
            "=r,l,r,~{memory}",
            [counter, target],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()


@triton.jit
def load_shared(pointer, mask=None, other=None):
    """What another program wrote before it arrived, from the L2 cache: a line of L1 is of no use to a later step."""
    return tl.load(pointer, mask, other, cache_modifier=".cg")
