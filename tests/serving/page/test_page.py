"""How the page behaves: what it sends, what it shares, and what it makes of errors and of hostile texts."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError

import pytest
from playwright.sync_api import Error, Route, expect

from page_view import View, rows_of

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>{{7*7}}</textarea><b>'
TOKEN = "secret of the test"


@pytest.fixture(scope="module")
def one(site: Callable[..., str], builtin: Any) -> str:
    """The address of a server of one model."""
    return site({"tiny": builtin})


@pytest.fixture(scope="module")
def many(site: Callable[..., str], served: dict[str, Any], builtin: Any) -> str:
    """The address of a server of every task, with two models that fill masks."""
    return site({"tiny": builtin, **served})


@pytest.fixture(scope="module")
def guarded(site: Callable[..., str], builtin: Any) -> str:
    """The address of a server that asks for a token."""
    return site({"tiny": builtin}, token=TOKEN)


def fetched(url: str, **headers: str) -> tuple[int, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}
    except HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}


def test_every_file_has_a_strict_policy_and_is_sent_once(view: Callable[..., View], one: str) -> None:
    page = view(one).open()
    files = {request.url for request in page.requests if request.method == "GET" and "/v1/" not in request.url}
    assert {url.rpartition("/")[2] for url in files} >= {"", "page.css", "page.js", "tools.js", "icon.svg"}
    for url in files:
        status, headers = fetched(url)
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert status == 200 and headers["x-content-type-options"] == "nosniff"
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert fetched(url, **{"If-None-Match": headers["etag"]})[0] == 304
        assert fetched(url, **{"If-None-Match": '"another"'})[0] == 200
    with pytest.raises(Error, match="TrustedHTML"):
        page.page.evaluate("document.body.innerHTML = '<b>text</b>'")
    assert len(page.faults) == 1
    page.faults.clear()


def test_it_works_under_a_prefix(view: Callable[..., View], site: Callable[..., str], builtin: Any) -> None:
    """The fixture checks that every request began with the address, prefix included."""
    page = view(site({"tiny": builtin}, prefix="/tools/gte")).open()
    assert len(rows_of(page.panel("fill-mask"))) == 1


def test_only_tools_that_the_model_answers_are_offered(view: Callable[..., View], one: str) -> None:
    page = view(one).open()
    assert page.shown_tools() == ["Fill mask", "Similarity", "Matrix", "Tokens"]
    served = page.page.locator("#served").inner_text()
    assert served.startswith("tiny · fill-mask · fp32") and served.endswith("up to 64 tokens")
    page.page.get_by_text("What else this server could do").click()
    others = page.page.locator("#others")
    assert others.locator("dt").all_inner_texts() == ["Rank", "Sparse weights", "Entities", "Classify"]
    expect(others).to_contain_text("gte-deploy serve ./my-reranker-bundle")
    expect(page.panel("fill-mask").get_by_label("Model")).to_be_hidden()


def test_of_several_models_one_can_be_chosen(view: Callable[..., View], many: str) -> None:
    page = view(many).open()
    panel = page.panel("fill-mask")
    models = panel.get_by_label("Model").locator("option")
    assert models.all_inner_texts() == ["tiny", "mask"]
    with page.page.expect_request("**/fill-mask") as sent:
        panel.get_by_label("Model").select_option("mask")
    assert sent.value.post_data_json["model"] == "mask"
    expect(page.page.locator("#served")).to_contain_text("mask · fill-mask")


def test_a_link_shows_the_same_view(view: Callable[..., View], many: str) -> None:
    first = view(many).open()
    panel = first.run("rank", query="the *old* king & co.", passages="one\ntwo = 2\nthree #3", raw=True)
    there = rows_of(panel)
    second = view(many).open(first.page.url.removeprefix(many))
    assert second.page.get_by_role("tab", selected=True).inner_text() == "Rank"
    assert rows_of(second.panel("rank")) == there
    assert second.page.title() == "Rank · gte-deploy"


def test_the_address_follows_what_one_types(view: Callable[..., View], one: str) -> None:
    page = view(one).open()
    page.panel("fill-mask").get_by_label("Text with a mask").press_sequentially(" More.")
    page.page.wait_for_url("**/*More.*")


@pytest.mark.parametrize(
    "fragment", ["#tool=nothing", "#tool=entities&text=x", "#%%%", "#tool=rank&model=nobody&raw=2"]
)
def test_a_link_that_does_not_fit_opens_the_first_tool(view: Callable[..., View], one: str, fragment: str) -> None:
    page = view(one).open(fragment)
    assert page.page.get_by_role("tab", selected=True).inner_text() == "Fill mask"
    assert len(rows_of(page.panel("fill-mask"))) == 1


def test_the_keyboard_is_enough(view: Callable[..., View], many: str) -> None:
    page = view(many).open()
    page.panel("fill-mask")
    keyboard = page.page.keyboard
    focused = page.page.locator(":focus")
    keyboard.press("Tab")
    expect(focused).to_have_text("Skip to the tools")
    keyboard.press("Enter")
    keyboard.press("Tab")
    expect(focused).to_have_text("Fill mask")
    keyboard.press("ArrowLeft")
    expect(focused).to_have_text("Tokens")
    keyboard.press("Home")
    keyboard.press("ArrowRight")
    expect(focused).to_have_text("Rank")
    page.panel("rank")
    keyboard.press("Tab")  # one tab stop for all tabs
    expect(focused).to_have_attribute("name", "query")
    keyboard.press("Control+A")
    keyboard.type("a river")
    with page.page.expect_request("**/rerank") as sent:
        keyboard.press("Enter")
    assert sent.value.post_data_json["query"] == "a river"
    keyboard.press("Tab")
    keyboard.press("Control+A")
    keyboard.type("one")
    keyboard.press("Enter")  # a new line
    keyboard.type("two")
    with page.page.expect_request("**/rerank") as sent:
        keyboard.press("Control+Enter")
    assert sent.value.post_data_json["texts"] == ["one", "two"]
    outline = focused.evaluate("element => getComputedStyle(element).outlineStyle")
    assert outline == "solid"


def test_texts_are_never_html(view: Callable[..., View], many: str) -> None:
    page = view(many).open()
    forms: dict[str, dict[str, str]] = {
        "fill-mask": {"text": f"[MASK] {HOSTILE}"},
        "rank": {"query": HOSTILE, "passages": HOSTILE},
        "similarity": {"first": HOSTILE, "second": HOSTILE},
        "matrix": {"texts": f"{HOSTILE}\n{HOSTILE}"},
        "sparse": {"text": HOSTILE},
        "entities": {"text": HOSTILE},
        "classify": {"text": HOSTILE},
        "tokens": {"text": HOSTILE},
    }
    for tool, values in forms.items():
        panel = page.run(tool, **values)
        panel.get_by_text("Request and answer").click()
        assert panel.locator(".answer").inner_text() or tool == "sparse"
        assert panel.locator("img, script, b").count() == 0
    expect(page.panel("rank").locator("tbody th")).to_have_text([HOSTILE])
    page.open("#" + "tool=tokens&text=" + "%3Cimg%20src%3Dx%20onerror%3Dalert(3)%3E")
    assert page.panel("tokens").locator("img").count() == 0


def test_answers_of_a_hostile_server_are_never_html(view: Callable[..., View], one: str) -> None:
    page = view(one)
    answer = [{"score": 0.5, "token": 1, "token_str": HOSTILE, "sequence": HOSTILE}]
    page.page.route("**/fill-mask", lambda route: route.fulfill(json=answer))
    panel = page.open().panel("fill-mask")
    assert rows_of(panel) == [[(HOSTILE, 0.5)]]
    page.page.route("**/fill-mask", lambda route: route.fulfill(status=502, body=HOSTILE))
    expect(page.run("fill-mask").get_by_role("alert")).to_contain_text(f"502: {HOSTILE}")
    assert panel.locator("img, script, b").count() == 0


def test_an_error_is_shown_as_the_server_says_it(view: Callable[..., View], one: str) -> None:
    page = view(one).open()
    alert = page.run("fill-mask", text="no mask").get_by_role("alert")
    assert alert.inner_text() == "422: input 0 has no mask; write [MASK] where a word is to be predicted"
    panel = page.run("fill-mask", text="a [MASK]")
    expect(panel.get_by_role("alert")).to_have_count(0)
    assert len(rows_of(panel)) == 1


def test_a_busy_server_says_how_long_to_wait(view: Callable[..., View], one: str) -> None:
    page = view(one)
    refusals = [{"error": "the queue is full", "error_type": "Overloaded"}]

    def answer(route: Route) -> None:
        if refusals:
            route.fulfill(status=429, json=refusals.pop(), headers={"Retry-After": "3"})
        else:
            route.continue_()

    page.page.route("**/fill-mask", answer)
    panel = page.open().panel("fill-mask")
    assert panel.get_by_role("alert").locator("p").all_inner_texts() == [
        "429: the queue is full",
        "It asks to wait 3 seconds.",
    ]
    panel.get_by_role("button", name="Try again").click()
    expect(panel.locator("table")).to_be_visible()


def test_a_server_that_is_gone_is_said_so(view: Callable[..., View], one: str) -> None:
    page = view(one).open()
    page.panel("fill-mask")
    page.page.route("**/fill-mask", lambda route: route.abort())
    expect(page.run("fill-mask").get_by_role("alert")).to_contain_text("The server does not answer")


def test_models_that_load_are_waited_for(view: Callable[..., View], one: str) -> None:
    page = view(one)
    refusals = [{"error": {"message": "the server loads tiny", "type": "server_error"}}]

    def answer(route: Route) -> None:
        if refusals:
            route.fulfill(status=503, json=refusals.pop())
        else:
            route.continue_()

    page.page.route("**/v1/models", answer)
    page.page.goto(one)
    notice = page.page.get_by_role("alert").locator("p")
    expect(notice).to_have_text(["the server loads tiny", "This page tries again until it is ready."])
    page.panel("fill-mask")
    expect(page.page.get_by_role("alert")).to_have_count(0)


def test_a_token_is_asked_for_and_kept_nowhere(view: Callable[..., View], guarded: str) -> None:
    page = view(guarded)
    page.page.goto(guarded)
    field = page.page.get_by_label("Bearer token")
    expect(field).to_be_focused()
    field.fill("another")
    field.press("Enter")
    expect(field).to_be_focused()
    expect(field).to_have_value("")
    field.fill(TOKEN)
    field.press("Enter")
    panel = page.panel("fill-mask")
    assert len(rows_of(panel)) == 1
    expect(field).to_be_hidden()
    kept = page.page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert TOKEN not in kept and TOKEN not in page.page.content()
    assert "Authorization: Bearer $GTE_DEPLOY_TOKEN" in panel.locator(".curl").text_content()


def test_a_newer_request_takes_the_place_of_an_older_one(view: Callable[..., View], one: str) -> None:
    page = view(one)
    held: list[Route] = []
    page.page.route("**/tokenize", lambda route: held.append(route) if not held else route.continue_())
    page.open()
    page.panel("fill-mask")
    page.page.locator("#tab-tokens").click()  # its first text is on the way, and stays there
    panel = page.page.locator("#panel-tokens")
    expect(panel).to_have_attribute("aria-busy", "true")
    panel.get_by_label("Text").fill("one")
    panel.get_by_role("button", name="Run").click()
    expect(panel.locator(".chips li")).to_have_count(3)
    assert held[0].request.failure == "net::ERR_ABORTED"
    expect(panel).not_to_have_attribute("aria-busy", "true")


def test_colours_follow_the_system_unless_one_is_chosen(view: Callable[..., View], one: str) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = view(one, color_scheme="light").open()
    dark = view(one, color_scheme="dark").open()
    assert light.page.evaluate(background) != dark.page.evaluate(background)
    light.page.get_by_label("Colours").select_option("dark")
    assert light.page.evaluate(background) == dark.page.evaluate(background)
    light.open()
    assert light.page.evaluate(background) == dark.page.evaluate(background)


def test_run_moves_to_an_answer_below_the_screen(view: Callable[..., View], one: str) -> None:
    page = view(one, viewport={"width": 320, "height": 500}).open()
    panel = page.panel("fill-mask")
    expect(panel.locator(".summary")).not_to_be_in_viewport()
    page.run("fill-mask")
    expect(panel.locator(".summary")).to_be_in_viewport()


LONG = "w" * 300


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_is_wider_than_the_screen(view: Callable[..., View], many: str, width: int) -> None:
    page = view(many, viewport={"width": width, "height": 640}).open()
    forms: dict[str, dict[str, str]] = {
        "fill-mask": {"text": f"{LONG[:40]} [MASK]"},
        "rank": {"query": "w", "passages": f"{LONG[:40]}\nw"},
        "similarity": {"first": LONG[:40], "second": "w"},
        "matrix": {"texts": "\n".join(f"{LONG[: 30 + number]}" for number in range(12))},
        "sparse": {"text": LONG[:40]},
        "entities": {"text": LONG[:40]},
        "classify": {"text": LONG[:40]},
        "tokens": {"text": f"{LONG} {'the ' * 100}"},
    }
    for tool, values in forms.items():
        panel = page.run(tool, **values)
        panel.get_by_text("Request and answer").click()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width, tool
        assert page.page.evaluate("document.scrollingElement.scrollLeft") == 0
