"""The page in a real browser: what it makes of five thousand rows, a failing server, and what strangers chose."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from urllib.parse import quote

import httpx
import pytest
from waiting import PATIENCE, until

from shmelim import EliminationReason
from shmelim.eliminations.record import generate_row

HOSTILE = "<script>document.title='injected'</script>"
QUOTES = "\" onmouseover=\"document.title='injected'\" x='"
UNBROKEN = "W" * 255
# A process that reads; it ends with the test.
READING = """
import sys, time
from setproctitle import setproctitle
from shmelim import EliminationReader
setproctitle(sys.argv[3])
reader = EliminationReader(sys.argv[1])
while True:
    for number in range(5100):
        reader.is_hotkey_eliminated(f"5Miner{number:042}")
        time.sleep(float(sys.argv[2]))
"""
# The page may run no script but its own; a copy of it, with its style, measures itself.
MEASURE = """<script>
const lines = [...document.querySelectorAll("time, thead th")].map((each) => {
  const range = document.createRange();
  range.selectNodeContents(each);
  return new Set([...range.getClientRects()].map((box) => box.top)).size;
});
document.title = `${document.documentElement.scrollWidth - innerWidth} ${Math.max(0, ...lines)}`;
</script>"""
# A reader's checks a second, and nothing else.
RATE = r'<td data-of="checks/s">([\d,]+)</td>'
WEB = "from setproctitle import setproctitle as to; to('shmelim web'); from shmelim.__main__ import main; main()"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.browser


@pytest.fixture
def browse(tmp_path):
    """Load an address and return the document that comes of it; with a picture of it, if a file is given."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")

    def browse(address, *, width=1440, dark=False, picture=None):
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000", "--timeout=10000"]
        command += (
            ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
        )
        command += [f"--screenshot={picture}"] if picture else ["--dump-dom"]
        done = subprocess.run([*command, address], capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    return browse


@pytest.fixture
def page(serve):
    """The address of the page of a server with 5,000 eliminations, and three that a stranger chose."""
    served = serve()
    reasons = list(EliminationReason.__members__)

    def made(hotkey, reason, number):
        return generate_row(
            hotkey, round(0.05 + number % 53 / 1000, 3), reason, 1_795_000_000_000 + 61_000 * number
        )

    rows = [made(f"5Miner{number:042}", reasons[number % len(reasons)], number) for number in range(5000)]
    with served.client() as client:
        strangers = [made(text, text, 5000) for text in (HOSTILE, QUOTES, UNBROKEN)]
        client.sync_eliminations([*rows, *strangers])
        client.sync_eliminations([*rows[:3000], *strangers])
        client.sync_eliminations([*rows, *strangers])
    command = [sys.executable, "-c", WEB, "web", "--name", served.name, "--port", "0"]
    with contextlib.ExitStack() as stack:
        for title, pause in (("mdd_checker", 0.002), ("limit_orders", 0.01), ("plagiarism", 0.05)):
            reading = [sys.executable, "-c", READING, served.name, str(pause), f"vali_{title}"]
            stack.callback(stack.enter_context(subprocess.Popen(reading)).kill)
        process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        yield served, re.search(r"http://\S+", process.stderr.readline()).group()


def test_what_strangers_chose_runs_nowhere(browse, page):
    _, address = page
    for text, shown in ((HOSTILE, "&lt;script&gt;"), (QUOTES, "onmouseover=")):
        for path in ("", f"?q={quote(text)}", f"miner?hotkey={quote(text)}"):
            document = browse(address + path)
            assert "<title>injected</title>" not in document
            assert shown in document
            assert document.count("<script") == 1
            assert not re.search(r"<[^>]* onmouseover=", re.sub(r'"[^"]*"', '""', document))


@pytest.mark.parametrize("width", [390, 1440])
def test_a_strangers_long_text_is_not_wider_than_the_window_and_crushes_no_column(browse, page, tmp_path, width):
    _, address = page
    style = f"<style>{httpx.get(f'{address}page/style.css').text}</style>"
    for path in ("", f"?q={UNBROKEN}", f"miner?hotkey={UNBROKEN}", f"miner?hotkey={quote(HOSTILE)}"):
        copy = tmp_path / "copy.html"
        copy.write_text(httpx.get(address + path, timeout=60).text + style + MEASURE)
        beyond, lines = re.search(r"<title>(-?\d+) (\d+)</title>", browse(copy.as_uri(), width=width)).groups()
        assert (int(beyond) <= 0, int(lines) <= 1) == (True, True), path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_is_drawn(browse, page, tmp_path, width, dark):
    served, address = page
    if dark:
        served.kill()
        until(lambda: httpx.get(f"{address}healthz").json()["status"] == "not served")
    until(lambda: set(re.findall(RATE, httpx.get(address, timeout=PATIENCE).text)) - {"0"})  # of two looks
    for what, path in (("page", ""), ("readers", "?q=script")):
        picture = tmp_path / f"{what}-{width}{'-dark' if dark else ''}.png"
        browse(address + path, width=width, dark=dark, picture=picture)
        assert picture.stat().st_size > 10_000
        if where := os.environ.get("SHMELIM_PICTURES"):  # a directory, for people to look at them
            shutil.copy(picture, where)
    document = browse(address, width=width)
    assert ("problem failing" in document) is dark
    assert "5,003 eliminations" in document
    assert document.count('class="reason"') == 200
    assert len(re.findall(RATE, document)) >= 3
