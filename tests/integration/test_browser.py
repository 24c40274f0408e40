"""The page in a real browser: what it makes of five thousand rows, a failing server, and what strangers chose."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from serving import row

from shmelim import EliminationReason

HOSTILE = "<script>document.title='injected'</script>"
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
    """The address of the page of a server with 5,000 eliminations, of which one was chosen by a stranger."""
    served = serve()
    reasons = list(EliminationReason.__members__)
    rows = [row(f"5Miner{number:042}", number, reason=reasons[number % len(reasons)]) for number in range(5000)]
    with served.client() as client:
        client.sync_eliminations([*rows, row(HOSTILE, 6000, reason=HOSTILE)])
        client.sync_eliminations([*rows[:3000], row(HOSTILE, 6000, reason=HOSTILE)])
        client.sync_eliminations([*rows, row(HOSTILE, 6000, reason=HOSTILE)])
    command = [sys.executable, "-m", "shmelim", "web", "--name", served.name, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield served, re.search(r"http://\S+", process.stderr.readline()).group()
        process.kill()


def test_what_strangers_chose_runs_nowhere(browse, page):
    _, address = page
    for path in ("", "?q=script", f"miner?hotkey={HOSTILE}"):
        document = browse(address + path)
        assert "<title>injected</title>" not in document
        assert "&lt;script&gt;" in document
    assert document.count("<script") == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_is_drawn(browse, page, tmp_path, width, dark):
    served, address = page
    if dark:
        served.kill()
    picture = tmp_path / f"page-{width}-{'dark' if dark else 'light'}.png"
    browse(address, width=width, dark=dark, picture=picture)
    assert picture.stat().st_size > 10_000
    if where := os.environ.get("SHMELIM_PICTURES"):  # a directory, for people to look at them
        shutil.copy(picture, where)
    document = browse(address, width=width)
    assert "5,001 eliminations" in document
    assert document.count('class="reason"') == 200
