"""Facts read from short pieces of machine code that were written for each test."""

from __future__ import annotations

import pytest

from attnc.runtime.toolchain.machine_code import Loop, read_amd, read_nvidia

RESOURCES = " Function f:\n  REG:168 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0"


def sass(text: str) -> str:
    """Format lines as nvdisasm prints them: labels in the first column, instructions with their address."""
    lines = []
    for n, line in enumerate(line.strip() for line in text.strip().splitlines()):
        lines.append(line if line.endswith(":") else f"        /*{n * 16:04x}*/                   {line} ;")
    return "\n".join(["\t.section\t.text.f", "f:", ".text.f:", *lines])


def loops(text: str) -> tuple[Loop, ...]:
    return read_nvidia(sass(text), RESOURCES.format(stack=0)).loops


WGMMA = """
    MOV R1, c[0x0][0x28]
    .L_x_0:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
    @!P0 BRA `(.L_x_2)
    .L_x_1:
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    MUFU.EX2 R3, R3
    HGMMA.64x64x16.F32.BF16 R56, R120, gdesc[UR8].tnspB, R56
    MUFU.EX2 R4, R4
    HGMMA.64x64x16.F32.BF16 R56, R124, gdesc[UR8].tnspB, R56, gsb0
    MUFU.EX2 R5, R5
    MUFU.RCP R6, R6
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @UP1 UTMALDG.4D [UR40], [UR38]
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P1 BRA `(.L_x_0)
    MUFU.EX2 R3, R3
    EXIT
    .L_x_2:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
    @!P0 BRA `(.L_x_2)
    BRA `(.L_x_1)
"""


def test_a_loop_with_products() -> None:
    (loop,) = loops(WGMMA)
    assert loop.products == {"HGMMA": 4}
    assert (loop.copies, loop.waits, loop.barriers) == (1, 2, 1)
    assert (loop.local_loads, loop.copied) == (0, 0)


def test_exponentials_overlap_products() -> None:
    (loop,) = loops(WGMMA)
    assert (loop.exponentials, loop.overlapped) == (3, 2)


def test_products_in_flight_across_iterations() -> None:
    text = """
        .L_x_0:
        MUFU.EX2 R3, R3
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        MUFU.EX2 R4, R4
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        @P0 BRA `(.L_x_0)
        EXIT
    """
    assert loops(text)[0].overlapped == 1


def test_a_wait_for_all_but_one_leaves_one_in_flight() -> None:
    text = """
        .L_x_0:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        MUFU.EX2 R3, R3
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        MUFU.EX2 R4, R4
        @P0 BRA `(.L_x_0)
        EXIT
    """
    assert loops(text)[0].overlapped == 1


def test_code_after_the_loop_is_not_part_of_it() -> None:
    """A jump from .L_x_2 back to .L_x_1 closes no loop; the spin of .L_x_2 on itself is a loop without products.

    Only the jump back belongs to the loop.
    """
    (loop,) = loops(WGMMA)
    assert loop.instructions == 15 + 1


def test_the_innermost_loop_is_analysed() -> None:
    text = """
        .L_x_0:
        LDL R3, [R1]
        .L_x_1:
        HMMA.16816.F32.BF16 R24, R4, R8, R24
        LDGSTS.E.BYPASS.128 [R7], [R24.64]
        @P0 BRA `(.L_x_1)
        @P1 BRA `(.L_x_0)
        EXIT
    """
    (loop,) = loops(text)
    assert (loop.instructions, loop.local_loads, loop.copies) == (3, 0, 1)


def test_a_branch_with_a_predicate_operand_falls_through() -> None:
    text = """
        .L_x_0:
        UTCHMMA gdesc[UR12], gdesc[UR16], tmem[UR15], tmem[UR34], idesc[UR35], !UPT
        BRA.U !UP0, `(.L_x_1)
        MUFU.EX2 R3, R3
        .L_x_1:
        BRA.U UP0, `(.L_x_0)
        EXIT
    """
    (loop,) = loops(text)
    assert (loop.products, loop.exponentials, loop.instructions) == ({"UTCHMMA": 1}, 1, 4)


def test_spills() -> None:
    text = """
        .L_x_0:
        LDL.LU R3, [R1+0x8]
        HMMA.16816.F32.BF16 R24, R4, R8, R24
        STL [R1+0x8], R3
        @P0 BRA `(.L_x_0)
        EXIT
    """
    code = read_nvidia(sass(text), RESOURCES.format(stack=48))
    assert (code.registers, code.stack) == (168, 48)
    assert (code.loops[0].local_loads, code.loops[0].local_stores) == (1, 1)


@pytest.mark.parametrize(
    ("between", "copied"),
    [
        ("", 16),
        ("PRMT R12, R8, 0x5410, R9\nMOV R8, R12", 16),
        ("FADD R8, R8, R9", 0),
        ("IMAD.MOV.U32 R8, RZ, RZ, R9", 16),
        ("IMAD R8, R9, R9, RZ", 0),
    ],
)
def test_copies_through_registers(between: str, copied: int) -> None:
    text = f"""
        .L_x_0:
        @!P0 LDG.E.128 R8, desc[UR4][R2.64]
        {between}
        STS.128 [R7], R8
        HMMA.16816.F32.BF16 R24, R4, R8, R24
        @P0 BRA `(.L_x_0)
        EXIT
    """
    lines = "\n".join(line for line in text.splitlines() if line.strip())
    assert loops(lines)[0].copied == copied


def test_elementwise_gathers_are_no_tile() -> None:
    text = """
        .L_x_0:
        LDG.E R8, desc[UR4][R2.64]
        STS [R7], R8
        HMMA.16816.F32.BF16 R24, R4, R12, R24
        @P0 BRA `(.L_x_0)
        EXIT
    """
    assert (loops(text)[0].copied, loops(text)[0].gathered) == (0, 4)


def test_a_tile_may_be_stored_one_iteration_later() -> None:
    text = """
        .L_x_0:
        STS.64 [R7], R8
        LDG.E.64 R8, desc[UR4][R2.64]
        HMMA.16816.F32.BF16 R24, R4, R12, R24
        @P0 BRA `(.L_x_0)
        EXIT
    """
    assert loops(text)[0].copied == 8


def test_code_without_a_loop() -> None:
    code = read_nvidia(sass("FADD R8, R8, R9\nEXIT"), RESOURCES.format(stack=0))
    assert (code.loops, code.products) == ((), {})


def test_no_kernel() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        read_nvidia("", "")


AMD = """
f:
    v_mfma_f32_32x32x8_bf16 v[0:15], v[52:53], v[76:77], v[0:15]
    v_mfma_f32_32x32x8_bf16 v[0:15], v[60:61], v[78:79], v[0:15]
    s_endpgm
    .private_segment_fixed_size: 12
    .vgpr_count:     252
    .vgpr_spill_count: 3
"""


def test_amd() -> None:
    code = read_amd(AMD)
    assert (code.registers, code.stack, code.spilled, code.products) == (252, 12, 3, {"MFMA": 2})


def test_amd_without_counts() -> None:
    with pytest.raises(ValueError, match="no vgpr_count"):
        read_amd("f:")
