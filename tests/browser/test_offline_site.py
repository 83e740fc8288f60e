"""The offline site in a browser without any network: opened from disk, linked, searchable, light and dark, no error."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.browser.conftest import ConsoleErrors
from tests.test_site import TOOL, needs_tool, quiet
from workbench.report.site import write_site

pytestmark = [pytest.mark.browser, needs_tool]


@pytest.fixture(scope="module")
def index(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the site's first page."""
    return write_site(tiny_run, tmp_path_factory.mktemp("offline") / "a site", tool=TOOL, say=quiet).as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open_from_disk_and_link_to_each_other(
    index: str,
    context: BrowserContext,
    page: Page,
    console_errors: ConsoleErrors,
    shoot: Callable[..., Path],
    scheme: str,
) -> None:
    context.set_offline(True)
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(index)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in ground[4:-1].split(",")) > 384) == (scheme == "light")
    shoot(page, f"site-{scheme}")
    page.get_by_role("table").get_by_role("link", name="01_widgets").click()
    page.locator("#twin").wait_for(state="visible")
    assert page.title().startswith("01_widgets")
    assert page.locator("math").first.bounding_box()["width"] > 20  # type: ignore[index]  # drawn, so it has a box
    page.get_by_role("link", name="00_figures").first.click()
    picture = page.locator(".cell_output img")
    picture.wait_for(state="visible")
    assert picture.evaluate("(node) => node.complete && node.naturalWidth > 0")
    assert picture.evaluate("(node) => getComputedStyle(node).backgroundColor") == "rgb(255, 255, 255)"
    shoot(page, f"site-figures-{scheme}")
    page.goto(index)
    page.get_by_role("link", name="The report of this run").click()
    page.get_by_role("heading", name="Run report").wait_for(state="visible")
    assert console_errors.found == []


def test_the_search_finds_a_word_of_one_page(
    index: str, context: BrowserContext, page: Page, console_errors: ConsoleErrors
) -> None:
    context.set_offline(True)
    page.goto(index)
    page.locator("input[name=q]").first.fill("twin")
    page.keyboard.press("Enter")
    page.locator("#search-results li a").first.wait_for()
    assert page.locator("#search-results li a").all_inner_texts() == ["01_widgets"]
    page.locator("#search-results li a").click()
    page.locator("#twin").wait_for(state="visible")
    assert console_errors.found == []
