"""The golden parameter file is what the core makes of the golden cases; the backends' own tests hold them to it."""

from cases import FILE, cases, reference, render


def test_the_core_gives_the_golden_file_to_the_byte():
    assert render([reference(case) for case in cases()]) == FILE.read_text(encoding="utf-8")
