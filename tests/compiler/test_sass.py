"""Descriptors of matrix products that ptxas has lost are found in what it wrote; others pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.sass import lost_descriptors, read
from pagedgen.compiler.space import default_schedule
from pagedgen.errors import CompileError
from pagedgen.values.schedule import Schedule

# The lines that matter of a kernel by ptxas 12.8.93, which crashed on an H100 with what UR9 held before, the
# softmax scale; and of the same by 12.9.86.
LOST = """
    /*4670*/                   ULDC UR9, c[0x0][0x258] ;   /* 0x0000960000097ab9 */
    /*47e0*/                   FMUL R96, R96, UR9 ;
    /*4a70*/                   UIADD3 UR9, UP0, UR9, 0x40, URZ ;
    /*4ac0*/                   UIADD3.X UR10, UR10, -0x7fffffe0, URZ, UP0, !UPT ;
    /*4b40*/                   IMAD.U32 R140, RZ, RZ, UR9 ;
    /*5160*/                   IMAD.U32 R141, RZ, RZ, UR10 ;
    /*6d70*/                   R2UR UR18, R140 ;
    /*6d80*/                   R2UR UR19, R141 ;
    /*6db0*/                   HGMMA.64x32x16.F32 R56, R28, gdesc[UR16].tnspB, R56 ;
"""
FOUND = """
    /*4a60*/                   IMAD.U32 R25, RZ, RZ, UR16 ;
    /*4ab0*/                   SHF.R.U32.HI R25, RZ, 0x4, R25 ;
    /*4af0*/                   SGXT.U32 R198, R25, 0xe ;
    /*4b30*/                   IADD3 R140, P3, R198.reuse, 0x40, RZ ;
    /*4b90*/                   IADD3.X R141, R28, 0x40000040, RZ, P3, !PT ;
    /*6d70*/              @!P2 R2UR UR18, R140 ;
    /*6d80*/                   R2UR UR19, R141 ;
    /*6db0*/                   HGMMA.64x32x16.F32 R56, R28, gdesc[UR16].tnspB, R56, gsb0 ;
"""
FROM_MEMORY = """
    /*0010*/                   USGXT.U32 UR6, UR6, 0xe ;
    /*0020*/                   UIADD3.64 UR8, UR6, 0x80, URZ ;
    /*0030*/                   LDL.64 R20, [R1+0x8] ;
    /*0040*/                   R2UR UR10, R20 ;
    /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
"""


def test_a_descriptor_that_begins_with_a_scale_is_lost() -> None:
    assert lost_descriptors(LOST) == ("HGMMA.64x32x16.F32 at 6db0 from ULDC at 4670",)


def test_one_that_nothing_writes_is_lost() -> None:
    lines = [line for line in LOST.splitlines() if "UR9, c[0x0]" not in line]
    assert lost_descriptors("\n".join(lines)) == ("HGMMA.64x32x16.F32 at 6db0 from nothing",)


@pytest.mark.parametrize("listing", [FOUND, FROM_MEMORY, "", "no listing"])
def test_fields_and_spilled_registers_are_addresses(listing) -> None:
    assert lost_descriptors(listing) == ()


def test_of_two_operands_in_memory_both_are_followed() -> None:
    lost = FROM_MEMORY.replace("USGXT.U32 UR6, UR6, 0xe", "ULDC.64 UR6, c[0x0][0x230]")
    assert lost_descriptors(lost) == ("HGMMA.64x64x16.F32.BF16 at 0050 from ULDC.64 at 0010",)


def test_wide_writes_count_for_each_of_their_registers() -> None:
    (wide,) = read("/*0010*/  LDS.128 R8, [R2] ;")
    assert [number for number in range(16) if wide.writes("R", number)] == [8, 9, 10, 11]
    assert not wide.writes("UR", 8)


def test_a_kernel_that_ptxas_spoils_is_refused(make_spec, h100) -> None:
    """Draw 218 of the fuzzer's seed 20261126, an illegal memory access on an H100."""
    triton = pytest.importorskip("triton")
    spec = make_spec(208, (32, 8), 3, kv="fp8_e5m2", op="extend", head_dim_v=40)
    own = {"ids": "gather", "num_stages": 2, "num_warps": 8, "prefetch_ids": 0, "tile": 64, "tile_m": 128}
    schedule = Schedule.of("triton-extend", **(dict(default_schedule(spec, h100).choices) | own))
    source = render(spec, h100, schedule)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    version = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True).stdout
    if "V12.8.93" not in version:
        compile_source(source)  # whatever comes of it is looked through
        return
    with pytest.raises(CompileError, match=r"ptxas lost the address of 6 matrix operands: HGMMA.*from ULDC"):
        compile_source(source)
