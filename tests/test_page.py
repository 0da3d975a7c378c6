"""The page at GET /, used in a real browser: by pointer, by keyboard only, on a phone, with a key, with errors."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from tests.fixtures import save_encoder
from tests.serving import Server, serving, until
from tests.stock import token_classifier, with_random_exits

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: tests/docker/packages.sh")
# With these flags, the browser makes no requests of its own.
FLAGS = ["--no-sandbox", "--no-first-run"]
UNUSED = ("gpu", "quic", "background-networking", "component-update", "sync")
FLAGS += [f"--disable-{part}" for part in UNUSED]
KEY = "alice-has-a-long-key"
DEMO = Path(__file__).parents[1] / "models"
expect.set_options(timeout=60_000)  # a busy machine may take longer than 5 s
BLOCKED = (
    "Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('', 'SecurityError') }})"
)
HARD = "You could do worse than spend an evening with it, but you could also do better."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(DEMO) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(store: Path) -> Iterator[Server]:
    """A server with keys and a guarantee, whose model takes pairs."""
    with serving(store, models=["tiny"], api_keys=f"alice {KEY}", guarantee=0.4, audit_share=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with topics, a multi-label classifier without exits, and tags, a token classifier with exits."""
    folder = tmp_path_factory.mktemp("stock")
    store, source = Store(folder / "store"), save_encoder(folder / "topics", labels=12)
    config = json.loads((source / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (source / "config.json").write_text(json.dumps(config))
    convert(Stock.open("my-org/stock", source), store, "topics", "int8")
    with_random_exits(token_classifier("bert"), store, "tags", "int8")
    return folder / "store"


@pytest.fixture(scope="module")
def tagged(stock: Path) -> Iterator[Server]:
    with serving(stock, models=["tags", "topics"], default_model="tags") as running:
        yield running


@pytest.fixture(scope="module")
def full_depth(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that audits and keeps records, but does not learn."""
    folder = tmp_path_factory.mktemp("state")
    with serving(stock, models=["topics"], audit_share=1.0, state_dir=folder) as running:
        yield running


@pytest.fixture(scope="module")
def learning(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("learned")
    with serving(stock, models=["topics"], guarantee=0.02, learn=True, state_dir=folder) as running:
        yield running


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Iterator[Page]:
    """A tab that the tests share, because a new one takes longer than most of them."""
    with browser.new_context(reduced_motion="reduce") as context:
        yield context.new_page()


@pytest.fixture(scope="module")
def clocked_tab(browser: Browser) -> Iterator[Page]:
    """A tab whose clock a test can advance."""
    with browser.new_context(reduced_motion="reduce") as context:
        context.clock.install()
        yield context.new_page()


@pytest.fixture
def page(tab: Page, server: Server) -> Iterator[Page]:
    yield from visited(tab, server)


@pytest.fixture
def clocked(clocked_tab: Page, server: Server) -> Iterator[Page]:
    yield from visited(clocked_tab, server)


def visited(page: Page, server: Server) -> Iterator[Page]:
    """The page; fails the test on an error of the script or its security policy, or a request that cannot succeed.

    Such a request is one to another server, or for something that this server lacks.
    """
    wrong: list[str] = []

    def read(line: ConsoleMessage) -> None:
        is_missing = any(status in line.text for status in (" 404 ", " 409 "))
        # The page learns from a 404 to /classify that a model was replaced.
        if "Refused to" in line.text or (is_missing and not line.location["url"].endswith("/classify")):
            wrong.append(f"{line.text} {line.location}")

    handlers: dict[Any, Any] = {
        "pageerror": lambda error: wrong.append(str(error)),
        "console": read,
        "request": lambda sent: (
            None if sent.url.startswith((server.url, "data:", "about:")) else wrong.append(sent.url)
        ),
    }
    for event, handler in handlers.items():
        page.on(event, handler)
    try:
        page.goto(server.url + "/")
        yield page
    finally:
        page.unroute_all()
        page.goto("about:blank")
        for event, handler in handlers.items():
            page.remove_listener(event, handler)
    assert wrong == []


def slide(page: Page, end: float) -> None:
    """Drag the slider's thumb. end: 0 is the left end of the track, 1 the right end."""
    slider = page.locator("#slider")
    slider.scroll_into_view_if_needed()
    box, last = slider.bounding_box(), int(slider.get_attribute("max") or 0)
    assert box is not None
    at = int(slider.input_value()) / last
    page.mouse.move(box["x"] + 8 + (box["width"] - 16) * at, box["y"] + box["height"] / 2)
    page.mouse.down()
    # The thumb's centre stays one radius away from both ends of the track.
    page.mouse.move(box["x"] + 8 + (box["width"] - 16) * end, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()


def test_the_exit_follows_text_and_threshold(page: Page, server: Server) -> None:
    page.fill("#text", "A wonderful film.")
    expect(page.locator("#summary strong")).to_contain_text("positive")
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "0")
    expect(page.locator("#layers .saved")).to_have_count(6)

    page.fill("#text", HARD)
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "5")
    slide(page, 1)  # τ = 1: every text exits at the first exit
    expect(page.locator("#value")).to_have_text("1.000")
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "0")
    expect(page.locator("#expected")).to_contain_text("On held-out texts: nearly all exit at layer 0, ")
    slide(page, 0)
    expect(page.locator("#value")).to_have_text("0.000")
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "6")
    expect(page.locator("#summary")).to_contain_text("ran all 6 layers")
    expect(page.locator("#expected")).to_contain_text("0.0% of labels differ from full depth")

    # The page shows the server's values.
    row = server.classify(input=HARD, tau=0).json()["data"][0]
    expect(page.locator("#summary strong")).to_have_text(f"{row['label']} {max(row['probs']) * 100:.1f}%")
    classes = zip(row["probs"], ["negative", "positive"], strict=True)
    ranked = [[name, f"{prob * 100:.1f}%"] for prob, name in sorted(classes, reverse=True)]
    shown = page.locator("#classes li")
    assert [item.locator("span").all_inner_texts() for item in shown.all()] == ranked


def test_what_the_page_says_of_a_text(page: Page, server: Server) -> None:
    page.fill("#text", "Dieser Film ist wirklich ganz wunderbar und sehr schön.")
    expect(page.locator("#summary")).to_contain_text("Out-of-distribution score: 1.00 ")
    # The signal has one name.
    expect(page.locator("#score-name")).to_have_text("risk that the answer differs from full depth")
    spoken = page.locator("#layers .bars").first.get_attribute("title") or ""
    assert "risk 0." in spoken and "score" not in spoken

    text = "An 🎈 of a film. " * 150
    end = server.classify(input=text).json()["data"][0]["truncated_at"]
    page.fill("#text", text)
    expect(page.locator("#summary")).to_contain_text(f"truncated after “…{text[end - 30 : end]}”.")


def test_what_is_typed_while_the_page_loads_replaces_its_example(page: Page, server: Server) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/calibration", hold)
    page.goto("about:blank")  # a reload would restore the fields
    page.goto(server.url + "/")
    while not held:
        page.wait_for_timeout(1)
    page.focus("#text")
    expect(page.locator("#text")).to_have_value("")
    held[0].continue_()
    expect(page.locator("#text")).not_to_have_value("")
    page.keyboard.insert_text("Fine.")
    expect(page.locator("#text")).to_have_value("Fine.")


def test_what_the_page_says_of_a_guard(tab: Page) -> None:
    text = "a dull and boring mess , bad and awful"
    with serving(DEMO, flags=["negative@0.6"], tau=0.9) as server:
        row = server.classify(input=text, explain=True, flag_threshold=0.6, flag="negative").json()["data"][0]
        assert row["flag"]["flagged"] and any(one["score"] < 0.9 for one in row["layers"][:-1])
        for page in visited(tab, server):
            page.fill("#text", text)
            summary = page.locator("#summary")
            prob = f"{row['flag']['prob'] * 100:.1f}%"
            expect(summary).to_contain_text(f"(negative {prob}, flagged from 60%)")
            expect(summary).to_contain_text("Early exits may miss any number of the flagged texts.")
            expect(page.locator("#layers")).to_contain_text("flagged: no exit")


def test_the_first_time_of_a_cold_server_is_not_shown(page: Page) -> None:
    sent: list[str] = []

    def answer(route: Route) -> None:
        sent.append(route.request.post_data or "")
        response, ms = route.fetch(), "83.8" if len(sent) == 1 else "1.6"
        route.fulfill(response=response, headers={"Server-Timing": f"model;dur={ms}, total;dur={ms}"})

    page.route("**/classify", answer)
    page.reload()
    expect(page.locator("#summary")).to_contain_text("1.6 ms in the model")
    expect(page.locator("#summary")).to_contain_text("after 1.6 ms")


def in_force(page: Page, words: str, value: str) -> None:
    """Check the words on the τ in force, and that the slider for τ stands there."""
    expect(page.locator("#in-force")).to_have_text(f"Requests that set nothing: τ = {words}.")
    expect(page.locator("#value")).to_have_text(value)


def test_the_slider_starts_at_the_tau_in_force(page: Page, server: Server, keyed: Server) -> None:
    default = httpx.get(server.url + "/v1/models").json()["data"][0]["defaults"]["tau"]
    in_force(page, f"{round(default, 4):g}, the model's default", f"{default:.3f}")
    expect(page.locator("#layers .exit")).to_have_count(1)
    slide(page, 1)
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "0")
    in_force(page, f"{round(default, 4):g}, the model's default", "1.000")
    page.get_by_label("Latency budget").check()
    # Another choice forgets the user's τ.
    with page.expect_request(lambda sent: '"signal"' in (sent.post_data or "")) as sent:
        page.get_by_label("Threshold τ").check()
    assert sent.value.post_data_json.keys().isdisjoint({"tau", "latency_budget_ms"})
    in_force(page, f"{round(default, 4):g}, the model's default", f"{default:.3f}")

    for tau, set_by, words in (
        (0.1234, "default", "0.1234, the server's --tau"),
        (0, "target_speedup", "0, the server's --target-speedup"),
    ):
        changing(page, tau_choice={"tau": tau, "set_by": set_by})
        page.fill("#text", f"A film {set_by}.")
        in_force(page, words, f"{tau:.3f}")

    for at in visited(page.context.new_page(), keyed):
        # The example's answer, which says more, could arrive before the metrics.
        at.route("**/classify", lambda _: None)
        at.fill("#key", KEY)
        at.keyboard.press("Enter")
        in_force(at, "0, set by the server", "0.000")
        at.unroute("**/classify")
        at.fill("#text", "good")
        in_force(at, "0, chosen by the guarantee that at most 40% of labels differ from full depth", "0.000")
        expect(at.locator("#measured")).to_contain_text("(0 so far)")  # the page's texts are not audited


def changing(page: Page, full_depth: dict[str, Any] | None = None, **fields: Any) -> None:
    """Change fields of the answers to /classify, or of their first rows, from now on.

    full_depth: fields of the answers at full depth, instead.
    """

    def change(route: Route) -> None:
        body = route.fetch().json()
        is_full_depth = json.loads(route.request.post_data or "").get("tau") == 0
        for name, value in (full_depth or {} if is_full_depth else fields).items():
            (body if name in body else body["data"][0])[name] = value
        route.fulfill(json=body)

    page.unroute("**/classify")
    page.route("**/classify", change)


def test_a_multi_label_model_without_exits(tab: Page, full_depth: Server) -> None:
    for page in visited(tab, full_depth):
        page.fill("#text", "a good film")
        expect(page.locator("#summary")).to_contain_text("ran all 3 layers")
        expect(page.locator("#no-exits")).to_contain_text(
            "topics:1 has no exits: every text runs through all"
        )
        commands = [
            "de3 import my-org/stock --texts texts.txt --name with-exits",
            "de3 serve my-org/stock --learn --guarantee 0.02",
        ]
        expect(page.locator("code")).to_have_text(commands)
        expect(page.locator("#measured")).to_contain_text("There is nothing to measure")
        for gone in ("#slider", "#compare", "#layers", "#curve", "#exits", "#speedup"):
            expect(page.locator(gone)).to_be_hidden()

        row = full_depth.classify(input="a good film").json()["data"][0]
        assert 0 < len(row["labels"]) < 12
        expect(page.locator("#summary strong")).to_have_text(", ".join(row["labels"]))
        ranked = sorted(range(12), key=lambda k: -row["probs"][k])
        names = page.locator("#classes li span:first-child")
        expect(names).to_have_text([f"LABEL_{k}" for k in ranked[:10]])
        page.get_by_role("button", name="2 more").click()
        expect(names).to_have_text([f"LABEL_{k}" for k in ranked])
        expect(page.locator("#classes .assigned")).to_have_count(len(row["labels"]))
        expect(page.locator("#classes .marker")).to_have_count(12)
        expect(page.locator("#assigned")).to_contain_text("above its threshold")
        expect(page.locator("#classes li").first).to_contain_text(f"{max(row['probs']) * 100:.1f}% > 50% ✓")
        expect(page.locator("#classes li").last).to_contain_text(" ≤ 50%")
        page.get_by_role("button", name="Show 10").click()
        expect(names).to_have_count(10)


def test_full_depth_is_shown_beside_an_early_answer(page: Page) -> None:
    page.fill("#text", "It was not a bad film.")
    expect(page.locator("#summary")).to_contain_text("Full depth disagrees: positive")
    expect(page.locator("#summary strong")).to_contain_text("negative")
    page.get_by_label("Compare with full depth").uncheck()
    expect(page.locator("#summary")).not_to_contain_text("Full depth")
    expect(page.locator("#layers .saved small").first).to_have_text("not run")
    expect(page.locator("#layers .exit small")).to_have_text("exits here")
    page.get_by_label("Compare with full depth").check()
    # Until then, an answer without labels may be compared with one that has them.
    expect(page.locator("#summary")).to_contain_text("Full depth")
    # Of a multi-label model, all labels are compared.
    for text, labels, words in (
        ("A wonderful film.", ["negative", "positive"], "disagrees: negative, positive"),
        ("A fine film.", ["positive"], "agrees"),
    ):
        changing(page, {"label": "positive", "labels": labels}, label="positive", labels=["positive"])
        page.fill("#text", text)
        expect(page.locator("#summary")).to_contain_text(f"Full depth {words}")


def test_other_choices_send_their_field(page: Page) -> None:
    for choice, field, words in (
        ("Speed-up", "target_speedup", "3.00×"),
        ("Disagreement", "max_disagreement", "2%"),
        ("Latency budget", "latency_budget_ms", "2 ms"),
    ):
        with page.expect_request(lambda sent, field=field: field in (sent.post_data or "")):  # type: ignore[misc]
            page.get_by_label(choice, exact=True).check()
        expect(page.locator("#value")).to_have_text(words)
        expect(page.locator("#layers .exit")).to_have_count(1)


def test_everything_by_keyboard_alone(page: Page) -> None:
    expect(page.locator("#layers .exit")).to_have_count(1)

    def press_tab_until(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                return
        pytest.fail(f"{name} does not get the focus")

    press_tab_until("text")
    page.keyboard.press("Control+A")
    page.keyboard.type("I expected to hate it, and I did not.")
    press_tab_until("slider")
    page.keyboard.press("End")
    expect(page.locator("#value")).to_have_text("1.000")
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "0")
    page.keyboard.press("Home")
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "6")
    page.keyboard.press("Shift+Tab")  # to the options, which the arrow keys select
    page.keyboard.press("ArrowDown")
    expect(page.locator("#slider-label")).to_contain_text("speed-up")
    focused = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focused == "solid"  # the focus is visible


def test_refusals_are_the_servers_own_words(page: Page) -> None:
    page.locator("#text").fill("word " * 20_000)
    page.get_by_label("Latency budget").check()
    expect(page.get_by_role("alert")).to_contain_text("cannot be met")
    expect(page.locator("#layers li")).to_have_count(0)
    page.locator("#text").fill("A wonderful film.")
    expect(page.locator("#problem")).to_be_empty()
    expect(page.locator("#layers .exit")).to_have_count(1)
    page.locator("#text").fill("")
    expect(page.locator("#summary")).to_contain_text("Type a text")


def shows(page: Page, server: Server, speedup: str, shares: list[str]) -> None:
    """Check the speed-up and the shares of the layers, once the page has read what the server has counted."""
    until(lambda: server.service.in_flight == 0, "all texts to be counted")
    poll(page, 1)
    expect(page.locator("#speedup")).to_have_text(speedup)
    assert [text.rpartition("\n")[2] for text in page.locator("#exits li").all_inner_texts()] == shares


def test_live_figures_come_from_the_metrics_without_the_pages_comparisons(
    clocked: Page, server: Server
) -> None:
    page = clocked
    expect(page.locator("#summary")).to_contain_text("Full depth agrees")
    until(lambda: server.service.in_flight == 0, "the example's texts to be counted")
    expect(page.locator("#measured")).to_be_hidden()  # this server audits nothing
    poll(page, 31)  # the figures are those of a minute
    expect(page.locator("#rate")).to_have_text("–")
    with page.expect_response(lambda got: '"tau":0' in (got.request.post_data or "")):
        page.fill("#text", "A wonderful film.")
    expect(page.locator("#summary")).to_contain_text("Full depth agrees")
    shows(page, server, "over 100×", ["100%", *["0%"] * 6])
    server.classify(input=["A wonderful film."] * 59, tau=1)  # exit at the embeddings
    server.classify(input=["A wonderful film."] * 30, tau=0)
    shows(page, server, "3.0×", ["67%", *["0%"] * 5, "33%"])
    expect(page.locator("#rate")).not_to_have_text("–")
    expect(page.locator("#p99")).to_contain_text("ms")


def test_wcag(tab: Page, server: Server, full_depth: Server) -> None:
    for page in visited(tab, server):
        expect(page.locator("#layers .exit")).to_have_count(1)
        expect(page.locator("#exits li")).to_have_count(7)
        accessible(page)
    for page in visited(tab, full_depth):
        page.fill("#text", "a good film")
        page.get_by_role("button", name="2 more").click()
        expect(page.locator("#classes li")).to_have_count(12)
        accessible(page)


def accessible(page: Page) -> None:
    """WCAG is kept; on a phone, the answer is under the text, and nothing scrolls horizontally."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    for scheme, width in (("light", 1280), ("dark", 360)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": width, "height": 720})
        found = Axe().run(page, options={"runOnly": {"type": "tag", "values": tags}})
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    places = [part.bounding_box() for part in page.locator("main section").filter(visible=True).all()]
    text, answer = (page.locator(f"section:has({part})").bounding_box() for part in ("#text", "#summary"))
    assert [text, answer] == sorted(filter(None, places), key=lambda box: box["y"])[:2]
    page.emulate_media(color_scheme="null")
    page.set_viewport_size({"width": 1280, "height": 720})


def test_a_key_is_asked_for_and_kept_in_the_tab(tab: Page, keyed: Server) -> None:
    for page in visited(tab, keyed):
        expect(page.get_by_role("heading", name="This server needs an API key")).to_be_visible()
        expect(page.locator("#main")).to_be_hidden()

        def enter(key: str) -> None:
            page.fill("#key", key)  # noqa: B023
            page.keyboard.press("Enter")  # noqa: B023

        for wrong, says in (
            ("a-wrong-key-of-mine", "Unknown API key."),
            ("schlüssel-für-alles", "only ASCII characters"),
        ):
            enter(wrong)
            expect(page.locator("#key-error")).to_contain_text(says)
        page.route("**/v1/models", lambda route: route.abort())
        enter(KEY)
        expect(page.locator("#key-error")).to_contain_text("The server cannot be reached")
        page.unroute("**/v1/models")
        enter(KEY)
        expect(page.locator("#layers .exit")).to_have_count(1)
        assert page.evaluate("document.activeElement.id") == "text"
        page.reload()
        expect(page.locator("#layers .exit")).to_have_count(1)
        expect(page.locator("#measured")).to_contain_text("guarantees that at most 40% of labels differ")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.evaluate("sessionStorage.clear()")
        page.reload()
        page.evaluate(BLOCKED)  # until the page is reloaded, the key is kept nevertheless
        enter(KEY)
        expect(page.locator("#layers .exit")).to_have_count(1)


def caught(page: Page, held: list[Route]) -> Route:
    """Wait until a handler holds a request; returns its route.

    The handler may run some time after the request is reported. Raises IndexError after a minute.
    """
    for _ in range(6000):
        if held:
            break
        page.wait_for_timeout(10)
    return held.pop()


def drawn(page: Page) -> None:
    """Wait until the page has handled every answer that it has received, drawing included."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def test_answers_are_those_of_the_same_text_and_never_older_ones(page: Page) -> None:
    expect(page.locator("#layers .exit")).to_have_count(1)
    sent, held = list[str](), list[Route]()

    def change_the_text(route: Route) -> None:
        sent.append(json.loads(route.request.post_data or "")["input"])
        if "awful" in sent[-1]:
            held.append(route)
            return
        if len(sent) == 1:  # as if the user typed while the request is in flight
            page.evaluate("document.getElementById('text').value = 'Another text.'")
        route.continue_()

    page.route("**/classify", change_the_text)
    page.fill("#text", HARD)
    expect(page.locator("#layers .exit")).to_have_attribute("data-layer", "5")
    assert sent == [HARD, HARD]
    page.fill("#text", "An awful film.")
    older = caught(page, held)
    with page.expect_event("requestfailed", lambda failed: failed == older.request):  # the page gives it up
        page.fill("#text", "A wonderful film.")
    expect(page.locator("#summary strong")).to_contain_text("positive")


def test_typing_while_the_models_load(clocked: Page, server: Server) -> None:
    page = clocked
    models = httpx.get(server.url + "/v1/models").json()
    for model in models["data"]:
        del model["role"]  # models have no role while they load
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.reload()
    expect(page.locator("#problem")).to_contain_text("The models are still loading.")
    page.fill("#text", "A wonderful film.")
    for choice in ("Speed-up", "Threshold τ"):
        page.get_by_label(choice, exact=True).check()
    page.unroute("**/v1/models")
    page.clock.run_for(1000)
    expect(page.locator("#summary strong")).to_contain_text("positive")
    expect(page.locator("#curve")).to_be_visible()
    expect(page.locator("#problem")).to_be_empty()


def odd_model() -> dict[str, Any]:
    """A row of /v1/models: many exits, and many labels with long names, one with markup."""
    labels = [f"{i}-ein_sehr_langer_Name_ohne_Leerzeichen_und_ohne_Ende" for i in range(9_999)]
    labels.append("<img src=x onerror=document.title='owned'>")
    name, defaults = "odd-model-with-a-name-that-is-rather-long", {"tau": 0.1, "signal": "entropy"}
    row = {"id": f"{name}:12", "name": name, "labels": labels, "input": None, "role": "current"}
    row |= {"calibration": {}, "tolerance": None}
    return row | {"num_layers": 24, "exit_layers": list(range(25)), "defaults": defaults | {"lambda": None}}


def odd_answer(model: dict[str, Any]) -> dict[str, Any]:
    """A row of /classify without a distance ratio, cut short by a deadline."""
    reading = {"score": 0.9, "entropy": 0.9, "distance_ratio": None, "edr": None, "probs": [1e-4] * 10_000}
    layers = [{"layer": i, "label": model["labels"][-1], **reading} for i in range(8)]
    left = {"layer": 7, "num_layers": 24, "reason": "deadline", "tau": 0.1}
    left |= {"signal": "entropy", "lambda": None}
    return {"label": model["labels"][0], "probs": reading["probs"], "exit": left, "layers": layers}


def test_models_of_every_shape_one_after_the_other(page: Page, server: Server) -> None:
    real, odd = httpx.get(server.url + "/v1/models").json()["data"][0], odd_model()
    answer = {"data": [odd_answer(odd)], "tau_choice": {"tau": 0.1, "set_by": "default"}}
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    def classify(route: Route) -> None:
        asks_odd = json.loads(route.request.post_data or "")["model"] == odd["id"]
        route.fulfill(json=answer) if asks_odd else route.continue_()

    page.set_viewport_size({"width": 320, "height": 700})
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [real, odd]}))
    page.route("**/classify", classify)
    page.route("**/v1/models/odd*/calibration", hold)
    page.reload()
    expect(page.locator("#layers li")).to_have_count(7)
    page.locator("#model").select_option(odd["id"])
    late = caught(page, held)
    # Choose another model while the first one's calibration is in flight.
    page.locator("#model").select_option(real["id"])
    expect(page.locator("#layers li")).to_have_count(7)
    point = {"signal": "entropy", "lambda": None, "tau": 0, "speedup": 1, "accuracy": 1, "disagreement": 0}
    with page.expect_response("**/calibration"):
        late.fulfill(json={"table": [point, point]})
    drawn(page)
    expect(page.locator("#slider")).to_have_attribute("max", "240")

    page.locator("#model").select_option(odd["id"])
    caught(page, held).fulfill(json={"table": []})
    expect(page.locator("#layers li")).to_have_count(25)
    expect(page.locator("#layers .exit small")).to_have_text("deadline reached")
    expect(page.locator("#accuracy")).to_be_hidden()
    shown = page.locator("#choices label").filter(visible=True)
    expect(shown).to_have_text(["Threshold τ", "Latency budget"])  # the others need a calibration
    page.get_by_role("button", name="9,990 more").click()
    expect(page.locator("#classes li")).to_have_count(10_000)
    page.get_by_role("button", name="Show 10").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.title().startswith("DE3")
    page.set_viewport_size({"width": 1280, "height": 720})


def test_a_model_that_was_replaced(page: Page, server: Server) -> None:
    real = httpx.get(server.url + "/v1/models").json()["data"][0]
    old = {**real, "id": "sst2:0", "version": 0, "calibration": None}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [old]}), times=1)
    page.reload()
    # A request to version 0 gets a 404; the page then asks again which models are served.
    expect(page.locator("#model")).to_have_value("sst2:1")
    expect(page.locator("#layers .exit")).to_have_count(1)


def test_pairs_where_the_model_takes_them(page: Page, keyed: Server) -> None:
    expect(page.locator("#layers .exit")).to_have_count(1)
    expect(page.get_by_label("A pair of texts")).to_be_hidden()  # the demo model takes single texts
    for other in visited(page.context.new_page(), keyed):
        other.fill("#key", KEY)
        other.keyboard.press("Enter")
        other.fill("#text", "good")
        other.get_by_label("A pair of texts").check()
        expect(other.locator("#summary")).to_contain_text("Type both texts")
        with other.expect_request(lambda sent: "text_pair" in (sent.post_data or "")):
            other.get_by_label("Second text of the pair").fill("bad")
        expect(other.locator("#layers .exit")).to_have_count(1)


def poll(page: Page, times: int) -> None:
    """Advance the page's fake clock so that the page polls the server this many times."""
    for _ in range(times):
        with page.expect_response("**/metrics"):
            page.clock.run_for(2000)


AUDIT = {
    "audits": 3,
    "tau": {"tau": 0.25, "reason": "evidence"},
    "guarantee": {"max_disagreement": 0.005, "confidence": 0.95, "reason": "evidence"},
    "measured": {"disagreement": 0.0123, "lower": 0.0001, "upper": 0.0457, "confidence": 0.95},
    "calibrated": {"disagreement": 0.003, "disagreement_bound": 0.01, "speedup": 3},
}


def test_the_sentence_about_audits(tab: Page, learning: Server) -> None:
    measured = "τ = 0.25: 1.23% of labels differ (0.01% to 4.57% with 95% confidence)"
    nothing = {"disagreement": None, "lower": 0, "upper": 1, "confidence": 0.95}
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"guarantee": None}, ["on 3 live texts", measured, "; on held-out texts 0.3%."]),
        ({"guarantee": None, "calibrated": None, "audits": 1}, ["on 1 live text ", f"{measured}."]),
        (
            {"measured": nothing},
            ["No live text has been measured", "Guaranteed: at most 0.5% of labels differ from full depth."],
        ),
        (
            {"tau": {"tau": 0, "reason": "change"}},
            ["0.5%", "for now every text runs to full depth", "3 so far"],
        ),
    ]
    report = dict(AUDIT)  # the page may ask before the first case
    learned = {"records": 64, "message": "a fit has begun"}
    for page in visited(tab, learning):
        page.route("**/audit", lambda route: route.fulfill(json=report))
        page.route("**/learn", lambda route: route.fulfill(json=learned))
        for changed, words in cases:
            report.update(AUDIT | changed)
            page.reload()
            for part in (*words, "from live texts (64 records): a fit has begun."):
                expect(page.locator("#measured")).to_contain_text(part)
        expect(page.locator("#no-exits")).to_be_visible()
        expect(page.locator("code").first).to_be_hidden()  # the server learns exits already


def test_the_sentence_about_audits_stays_while_the_server_is_busy(
    clocked_tab: Page, full_depth: Server
) -> None:
    busy: dict[str, Any] = {"status": 503, "json": {"error": {"message": "busy"}}}
    for page in visited(clocked_tab, full_depth):
        for answer, is_shown in ((busy, False), ({"json": AUDIT}, True), (busy, True)):
            page.unroute("**/audit")
            page.route("**/audit", lambda route, _, answer=answer: route.fulfill(**answer))  # type: ignore[misc]
            if not is_shown:
                page.reload()
            poll(page, 6 if is_shown else 1)
            expect(page.locator("#measured")).to_be_visible(visible=is_shown)


def test_the_page_is_one_response_with_a_strict_policy(server: Server) -> None:
    response = httpx.get(server.url + "/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert httpx.head(server.url + "/").headers["content-length"] == response.headers["content-length"]
    assert len(response.content) < 52_000


SPANS = "Ⓐ 😀 <b>Ana</b> of e\u0301 \n<img src=x onerror=document.title='owned'>"


def test_spans_are_marked_in_the_text_or_redacted(tab: Page, tagged: Server) -> None:
    label = "<i>NAME"
    words = [SPANS.index("Ana"), SPANS.index("<img")]
    found = [(words[0], words[0] + 3), (words[0], words[0] + 3), (words[1], len(SPANS))]
    spans = [{"start": start, "end": end, "label": label, "score": 0.987} for start, end in found]

    def answered(route: Route) -> None:
        """The server's answer with other spans; those of full depth are without the last."""
        body = json.loads(route.request.post_data or "")
        answer = route.fetch().json()
        row = answer["data"][0]
        row["spans"] = row["layers"][0]["spans"] = spans[:-1] if body.get("tau") == 0 else spans
        route.fulfill(json=answer)

    for page in visited(tab, tagged):
        page.fill("#text", "a good film")
        expect(page.locator("#summary strong")).to_contain_text(" span")
        expect(page.locator("#marked")).to_contain_text("a good film")
        page.route("**/classify", answered)
        page.fill("#text", SPANS)
        expect(page.locator("mark")).to_have_count(2)
        assert page.locator("mark").all_text_contents() == [
            f"Ana {label} 99%",
            f"{SPANS[words[1] :]} {label} 99%",
        ]
        text = page.locator("#marked").text_content() or ""
        assert text.replace(f" {label} 99%", "") == SPANS
        assert page.locator("#marked img, #marked b, #marked i").count() == 0 and page.title().startswith(
            "DE3"
        )
        expect(page.locator("#summary strong")).to_have_text("3 spans")
        expect(page.locator("#summary")).to_contain_text("Full depth disagrees: 2 spans")
        expect(page.locator("#layers .label").first).to_have_text("3 spans")
        accessible(page)
        page.unroute("**/classify")
        page.get_by_label("Redact").check()
        expect(page.locator("mark")).to_have_count(0)
        (row,) = tagged.classify(input=SPANS, redact=True).json()["data"]
        expect(page.locator("#marked")).to_have_text(row["text"])
        page.locator("#model").select_option("topics:1")
        expect(page.locator("#classes li")).to_have_count(10)
        expect(page.locator("#marked")).to_be_hidden()
        expect(page.get_by_label("Redact")).to_be_hidden()
