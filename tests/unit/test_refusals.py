"""Every refusal and warning of preflight: which, why, and what to do."""

from __future__ import annotations

import pytest

from tests.support.findings import PAGE, codes_in_the_source, example, examples, page


@pytest.mark.parametrize("code", sorted(examples()))
def test_a_finding_names_the_thing_and_the_way_out(code):
    finding = example(code)
    assert len(finding.message) > 20
    assert len(finding.hint) > 15
    assert finding.table is None or finding.table.name in finding.message


def test_every_finding_has_an_example():
    assert set(codes_in_the_source()) - set(examples()) == set()


def test_the_page_of_findings_is_what_preflight_says():
    assert PAGE.read_text() == page()
