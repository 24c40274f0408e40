"""The page of a name: what it shows, what it refuses, and that nothing a stranger chose becomes part of it."""

import asyncio
import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import pytest
from invoking import CliRunner
from ledger import hang
from prometheus_client.parser import text_string_to_metric_families
from serving import row
from starlette.testclient import TestClient
from waiting import PATIENCE, until

from shmelim.cli.main import cli
from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import PREFIX, Status
from shmelim.fleet.follower import Applied
from shmelim.fleet.local import LocalTable
from shmelim.fleet.messages import Row
from shmelim.fleet.publishing import Note
from shmelim.shm import SharedNamespace
from shmelim.shm.following import Position
from shmelim.watch import web

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
TOKEN = "a token of sixteen"


@pytest.fixture
def served(serve):
    """A server that the processes of this user find where they look by default."""
    return serve()


@pytest.fixture
def client(served):
    with served.client() as found:
        yield found


@pytest.fixture
def page(served):
    with TestClient(web.make_app(served.name, token=TOKEN), "http://localhost:8765") as page:
        yield page


def post(page, path, *, origin="http://localhost:8765", **form):
    return page.post(path, data=form, headers={"Origin": origin} if origin else {}, follow_redirects=False)


def test_who_reads_and_how_much(page, served, monkeypatch):
    code = (
        "import sys; from shmelim import EliminationReader; reader = EliminationReader(sys.argv[1])\n"
        "for line in sys.stdin:\n"
        "    [reader.is_hotkey_eliminated('a') for _ in range(int(line))]; print(1, flush=True)"
    )
    command = [sys.executable, "-c", code, served.name, HOSTILE]
    now = 100.0
    monkeypatch.setattr("shmelim.watch.readers.clock.monotonic", lambda: now)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reading:
        for checks, rate in ((1200, "–"), (300, "150")):
            print(checks, file=reading.stdin, flush=True)
            assert reading.stdout.readline()
            text = page.get("/").text
            (shown,) = re.findall(rf'<td class="title">{reading.pid} (.*?)</td>(.*?)</tr>', text, re.DOTALL)
            assert "<script>alert" not in text
            assert f">{rate}</td>" in shown[1]
            now += 2.0
        assert ">1,500</td>" in shown[1]
        reading.stdin.close()
    after = page.get("/").text
    assert f'<td class="title">{reading.pid} ' not in after
    assert "1,500 checks in all" in after


def test_counts_problems_and_the_table(page, client):
    client.sync_eliminations([row(f"h{number}", number) for number in range(450)])
    text = page.get("/").text
    assert "<dt>eliminated</dt><dd>450</dd>" in text
    assert '<p class="status">ok</p>' in text
    assert text.count('<td class="hotkey">') == 200
    assert "page 1 of 3" in text
    assert text.index(">h449<") < text.index(">h448<"), "the latest first"
    assert page.get("/?page=3").text.count('<td class="hotkey">') == 50
    assert page.get("/?page=77777777777").text.count('<td class="hotkey">') == 200
    found = page.get("/?q=H44&sort=hotkey").text
    assert re.findall(r">(h\d+)</a>", found) == ["h44", *(f"h44{number}" for number in range(10))]


def test_all_that_is_known_of_one_miner(page, client):
    client.add_elimination("a", row("a"))
    client.add_elimination("a", row("a") | {"dd": 0.5, "reason": "LIQUIDATED"})
    text = page.get("/miner", params={"hotkey": "a"}).text
    assert "<del>ZOMBIE</del>" in text
    assert "<ins>LIQUIDATED</ins>" in text
    assert page.get("/miner", params={"hotkey": "nobody"}).status_code == 200
    assert "not eliminated" in page.get("/miner", params={"hotkey": "nobody"}).text


def test_what_a_stranger_chose_is_text_wherever_it_stands(page, client):
    hostile = row(HOSTILE) | {"reason": HOSTILE, "note": HOSTILE}
    client.add_elimination(HOSTILE, hostile)
    client.add_elimination(HOSTILE, hostile | {HOSTILE: HOSTILE})
    for path, parameters in (("/", {}), ("/", {"q": HOSTILE}), ("/miner", {"hotkey": HOSTILE})):
        text = page.get(path, params=parameters).text
        assert HOSTILE not in text
        assert "<img" not in text
        assert html.escape("<script>alert(1)</script>") in text
        assert set(re.findall(r"<script[^>]*>", text)) == {'<script src="/page/follow.js" defer>'}


def test_the_page_stays_small_however_much_strangers_wrote(page, client):
    long = "x" * 500_000
    for stamp in range(3):
        record = row("a", stamp) | {"reason": long, "note": long[stamp:]} | {f"f{n}": n for n in range(5000)}
        client.add_elimination("a", record)
    problem = {"name": "positions", "severity": "degraded", "text": long[:5000], "remedy": None, "since_ms": 1}
    problems = [problem | {"subject": str(number)} for number in range(200)]
    client._call("report_processing_rpc", (1_700_000_000_000, 300_000, problems))
    for path in ("/", "/miner?hotkey=a"):
        text = page.get(path).text
        assert "(500,000 characters)" in text
        assert len(text) < 100_000
    assert "and 100 more" in page.get("/").text


def test_browsers_are_told_to_run_and_load_nothing_else(page):
    for path in ("/", "/miner?hotkey=a", "/healthz", "/page/follow.js", "/nowhere"):
        policy = page.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    assert not re.search(
        r"https?://", "".join(page.get(f"/page/{name}").text for name in ("style.css", "follow.js"))
    )


def test_another_name_that_leads_here_is_refused(page):
    for host, status in (("evil.example", 400), ("127.0.0.1:1", 200), ("[::1]:8765", 200)):
        assert page.get("/", headers={"Host": host}).status_code == status


def test_changes_need_the_token_and_a_form_of_ours(page, client):
    client.add_elimination("a", row("a"))
    for refused in (
        post(page, "/remove", hotkey="a", token="a wrong one, as long"),
        post(page, "/remove", hotkey="a"),
        post(page, "/remove", origin="http://evil.example", hotkey="a", token=TOKEN),
        post(page, "/remove", origin="null", hotkey="a", token=TOKEN),
        post(page, "/remove", origin="http://[::1", hotkey="a", token=TOKEN),
        post(page, "/remove", origin=None, hotkey="a", token=TOKEN),
    ):
        assert refused.status_code == 403
    assert post(page, "/remove", token=TOKEN).status_code == 400
    assert post(page, "/remove", hotkey="x" * 20_000, token=TOKEN).status_code == 413
    assert page.get("/remove").status_code == 405
    assert "a" in client
    assert post(page, "/remove", hotkey="a", token=TOKEN).status_code == 303
    assert "a" not in client


def test_without_a_token_nothing_can_be_changed(served, client):
    client.add_elimination("a", row("a"))
    with TestClient(web.make_app(served.name), "http://localhost:8765") as page:
        assert post(page, "/remove", hotkey="a", token="").status_code == 403
        assert "<form method" not in page.get("/miner?hotkey=a").text
    assert "a" in client


def test_a_change_that_the_guard_noticed_is_acknowledged(page, client):
    client.sync_eliminations([row(f"h{number}") for number in range(20)])
    client.sync_eliminations([])
    assert "guarded_change" in page.get("/").text
    assert post(page, "/ack", token=TOKEN).status_code == 303
    assert "guarded_change" not in page.get("/").text


def test_health_and_metrics(page, served):
    assert page.get("/healthz").json() == {"name": served.name, "status": "ok", "problems": []}
    families = {family.name for family in text_string_to_metric_families(page.get("/metrics").text)}
    assert "shmelim_up" in families
    served.kill()
    until(lambda: page.get("/healthz").status_code == 503)
    until(lambda: page.get("/healthz").json()["status"] == "not served")


def test_a_dead_server_leaves_the_table_to_look_at(page, client, served):
    client._call("eliminate_rpc", ("a", row("a"), ["positions"]))
    served.kill()
    until(lambda: "not_served" in page.get("/").text)
    assert '<td class="hotkey"><a href="/miner?hotkey=a">a</a>' in page.get("/").text
    text = page.get("/miner", params={"hotkey": "a"}).text
    assert "<ins>ZOMBIE</ins>" in text, "the history, from the store"
    assert "<li>owes positions" in text
    assert 'class="problem degraded"' in text


def test_a_table_that_follows_another_hosts_says_whose_and_how_old(new_name):
    name, source = new_name(), f"redis://engine {HOSTILE}"
    record = PREFIX.pack(0, 0) + encode(row("a"))
    with LocalTable(SharedNamespace(name), source) as table:
        table.replace(Applied(b"s" * 16, 5, 10, 1), [Row(b"a", Status.ELIMINATED, record, 1)])
        with TestClient(web.make_app(name, token=TOKEN), "http://localhost:8765") as page:
            text = page.get("/").text
            assert "<dt>age</dt><dd>unknown</dd>" in text
            assert "follower_old" in text
            assert HOSTILE not in text
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            table.confirm(Position(1, 5, 10, now, 1_700_000_000_000))
            text = page.get("/").text
            assert "<dt>follows</dt><dd>redis://engine" in text
            assert re.search("<dt>age</dt><dd>[0-9.]+ s</dd>", text)
            assert "follower_old" not in text
            assert ">ZOMBIE<" in page.get("/miner?hotkey=a").text
            refused = post(page, "/ack", token=TOKEN)
            assert refused.status_code == 409, refused.text


def test_what_was_not_published_yet_is_shown(page, served):
    Note(served.name, "redis://engine").write(behind=1234, held="the sync of 14:00")
    text = page.get("/").text
    assert "<dt>not sent yet</dt><dd>1,234</dd>" in text
    assert "the sync of 14:00" in text
    assert '<p class="status">ok</p>' in text


def test_a_name_that_nobody_ever_served(new_name):
    with TestClient(web.make_app(new_name()), "http://localhost:8765") as page:
        assert page.get("/").status_code == 200
        assert "start it with" in page.get("/").text
        assert page.get("/healthz").status_code == 503
        assert page.get("/miner", params={"hotkey": "a"}).status_code == 404


@pytest.fixture
def running(served, tmp_path):
    """A real ``shmelim web``."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "shmelim",
            "web",
            "--name",
            served.name,
            "--port",
            "0",
            "--token-file",
            tmp_path / "token",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def test_changes_come_as_they_are_made_until_the_page_ends(running, client):
    address = re.search(r"http://\S+", running.stderr.readline()).group()
    with httpx.stream("GET", f"{address}events", timeout=PATIENCE) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(": ")
        numbers = iter(range(10**6))
        client.add_elimination(HOSTILE, row(HOSTILE, next(numbers)))
        # It follows from the version that it saw when it began.
        for line in lines:
            if line.startswith("data: "):
                break
            client.add_elimination(HOSTILE, row(HOSTILE, next(numbers)))
        assert json.loads(line.removeprefix("data: "))["hotkey"] == HOSTILE
    running.terminate()
    assert running.wait(PATIENCE) is not None


def test_who_ends_the_page_hears_no_errors_of_what_it_cut_off(running, served):
    address = urlsplit(re.search(r"http://\S+", running.stderr.readline()).group())
    with socket.create_connection((address.hostname, address.port)) as asking:
        hang(served.pid)
        try:
            asking.sendall(f"GET /miner?hotkey=a HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            with httpx.stream("GET", f"{address.geturl()}events", timeout=PATIENCE) as answer:
                assert next(answer.iter_lines()).startswith(": ")
                running.terminate()
                assert running.communicate(timeout=PATIENCE)[1] == ""
        finally:
            os.kill(served.pid, signal.SIGCONT)


async def listen(app, until_gone):
    """Listen until told to go; return the status."""
    statuses = []

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive():
        await until_gone.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/events", "query_string": b"", "root_path": ""}
    await app({**scope, "headers": [(b"host", b"localhost")]}, receive, send)
    return statuses[0]


def test_listeners_are_bounded_however_they_come_and_those_that_went_make_room(served, monkeypatch):
    monkeypatch.setattr(web, "_MOST_LISTENING", 2)
    app = web.make_app(served.name)

    async def crowd():
        go = asyncio.Event()
        listening = [asyncio.ensure_future(listen(app, go)) for _ in range(5)]
        refused, _ = await asyncio.wait(listening[2:], timeout=PATIENCE)
        assert [task.result() for task in refused] == [503] * 3
        go.set()
        assert await asyncio.gather(*listening[:2]) == [200, 200]
        assert await listen(app, go) == 200

    asyncio.run(crowd())


def test_viewers_share_what_was_decoded_until_something_is_published(page, client, monkeypatch):
    decoded = []
    decode = web.EliminationReader.get_eliminations_from_memory
    monkeypatch.setattr(
        web.EliminationReader, "get_eliminations_from_memory", lambda self: decoded.append(self) or decode(self)
    )
    for hotkey in ("a", "b"):
        client.add_elimination(hotkey, row(hotkey))
        for _ in range(3):
            assert f">{hotkey}</a>" in page.get("/").text
    assert len(decoded) == 2


@pytest.mark.parametrize(
    ("mode", "text", "said"),
    [
        (0o644, TOKEN, "others may read"),
        (0o600, "short", "less than 16 characters"),
        (0o600, "ünïcödé" * 3, "no browser can send"),
        (0o600, "a line\nand another one", "no browser can send"),
    ],
)
def test_a_token_that_is_none(tmp_path, mode, text, said):
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    result = CliRunner().invoke(cli, ["web", "--token-file", str(file)])
    assert result.exit_code == 4
    assert said in result.stderr
    assert text not in result.stderr


def test_no_device_is_taken_for_a_token_nor_to_be_made_private():
    result = CliRunner().invoke(cli, ["web", "--token-file", "/dev/null"])
    assert (result.exit_code, "is a device" in result.stderr, "chmod" in result.stderr) == (4, True, False)


@pytest.mark.parametrize(
    "host", ["http://page.example.org", "page:80", "page/", "a b", "*", "ünï.example", "a..", "."]
)
def test_what_no_browser_says_is_no_host_to_allow(host):
    result = CliRunner().invoke(cli, ["web", "--allow-host", host, "--port", "70000"])
    assert result.exit_code == 2
    assert "--allow-host" in result.stderr
    assert "is not a host's name" in result.stderr


def test_a_port_that_another_has(running):
    port = re.search(r":(\d+)/", running.stderr.readline())[1]
    result = CliRunner().invoke(cli, ["web", "--port", port])
    assert result.exit_code == 4
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['shmelim', 'web']\n"
        "from shmelim.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "pip install 'shmelim[web]'" in done.stderr
