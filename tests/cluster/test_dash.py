"""The page that shows a run, of real processes: who is there, who was killed, and the curves; also when all is over."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.browser import MISSING, browser
from helpers.jobs import write_job
from helpers.pages import Stream, address_of, watching
from helpers.processes import command, finished
from helpers.waiting import until

import zsfl

EVERYBODY = ["aggregator", "split-server-0", "split-server-1", "client-0", "client-1"]


async def training(cluster: zsfl.LocalCluster) -> None:
    async for _ in cluster.train(100_000):
        pass


def loads(page: Stream) -> list[float]:
    """What a request takes at each split server that has said how busy it is."""
    servers = [node for node in page.live["seen"]["nodes"] if node["slots"]]
    return [server["service_s"] for server in servers if "steps" in server["rates"]]


async def test_a_killed_split_server_is_seen_to_be_gone_and_the_page_outlasts_what_it_shows(tmp_path: Path) -> None:
    job = write_job(tmp_path, rounds=100_000)
    async with zsfl.LocalCluster(job, runs=tmp_path / "runs", run="seen", mdns=False) as cluster:
        work = asyncio.create_task(training(cluster))
        async with command("dash", cwd=tmp_path) as dash:
            url = await address_of(dash)
            port = url.rstrip("/").rpartition(":")[2]
            async with watching(url) as page:
                await page.until(lambda seen: list(seen.there().values()) == ["there"] * 5 and len(seen.rounds) > 1)
                assert list(page.there()) == EVERYBODY
                await page.until(lambda seen: seen.live["seen"]["run"] and seen.live["seen"]["run"]["left_s"])
                assert page.live["seen"]["run"]["phase"] == "training"
                assert page.live["folder"] == "runs/seen"
                assert page.live["job"]["name"] == "tiny"
                assert page.rounds[0]["round"] == 1
                await page.until(lambda seen: len(loads(seen)) == 2)
                pid = cluster.nodes["split-server-0"].pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await page.until(lambda seen: seen.there()["split-server-0"] == "gone")
                (gone,) = [node for node in page.live["seen"]["nodes"] if node["name"] == "split-server-0"]
                assert gone["reason"]
                events = [(event["node"], event["what"]) for event in page.live["seen"]["events"]]
                assert ("split-server-0", f"is gone: {gone['reason']}") in events
                rounds = page.rounds[-1]["round"]
                await page.until(lambda seen: seen.rounds[-1]["round"] > rounds)
            async with watching(url) as page, command("dash", cwd=tmp_path) as other:  # several may look at once
                await page.until(lambda seen: seen.there().get("split-server-1") == "there")
                async with watching(await address_of(other)) as elsewhere:
                    await elsewhere.until(lambda seen: seen.there().get("aggregator") == "there")
                    assert "split-server-0" not in elsewhere.there()
            code, listed = await finished("ls", "--wait-s", "60", cwd=tmp_path)
            assert code == 0, listed.text
            dash.signal(signal.SIGINT)
            assert await dash.ended() == 0, dash.text
        async with command("dash", "runs/seen", "--port", port, cwd=tmp_path) as dash:
            assert await address_of(dash) == url, "the page that is open finds it again"
            async with watching(url) as page:
                await page.until(lambda seen: {"aggregator", "client-0"} <= seen.there().keys())
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                await until(cluster.stop("client-0"))
                await page.until(lambda seen: seen.there()["client-0"] == "gone")
                assert not any("another job" in event["what"] for event in page.live["seen"]["events"])


async def test_up_shows_its_run_and_what_it_left_is_shown_by_the_folder_alone(tmp_path: Path) -> None:
    job = write_job(tmp_path, rounds=100_000)
    async with command("up", job, "--run", "mine", "--no-mdns", "--in-process", "--dash", cwd=tmp_path) as up:
        async with watching(await address_of(up)) as page:
            await page.until(lambda seen: set(EVERYBODY) == set(seen.there()) and len(seen.rounds) > 2)
            assert page.live["title"] == "mine"
        up.signal(signal.SIGINT)
        await up.ended()
    async with command("dash", "mine", cwd=tmp_path) as dash, watching(await address_of(dash)) as page:
        await page.until(lambda seen: len(seen.rounds) > 2)
        assert page.there() == {}
        before = page.rounds[-1]["round"]
        async with command("up", job, "--run", "mine", "--resume", "--no-mdns", "--in-process", cwd=tmp_path) as up:
            # It is followed to where it was started again.
            await page.until(lambda seen: set(EVERYBODY) == set(seen.there()) and seen.rounds[-1]["round"] > before)
            await page.until(lambda seen: "gone" not in seen.there().values())
            up.signal(signal.SIGINT)
            await up.ended()
    shutil.move(tmp_path / "runs" / "mine", tmp_path / "elsewhere")
    async with command("dash", "elsewhere", cwd=tmp_path) as dash, watching(await address_of(dash)) as page:
        await page.until(lambda seen: len(seen.rounds) > 2)
        assert page.there() == {}
        assert page.rounds[-1]["serving"].keys() == {"client-0", "client-1"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "there is no run in runs: name the job whose nodes to look for"),
        (("job.py",), "job.py is no folder of a run; name one"),
        (("--peer", "127.0.0.1:9", "--port", "70000"), "70000 is no port for a page"),
        (("--peer", "127.0.0.1:9", "--host", "0.0.0.0"), "the IPv4 address of one interface"),
    ],
)
async def test_dash_says_what_is_wrong(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    (tmp_path / "job.py").touch()
    code, printed = await finished("dash", *args, cwd=tmp_path)
    assert code == 2
    assert said in "".join(printed.err)


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
async def test_the_page_in_a_browser(tmp_path: Path) -> None:
    job = write_job(tmp_path, rounds=100_000)
    async with (
        command("up", job, "--no-mdns", "--in-process", "--dash", cwd=tmp_path) as up,
        browser(tmp_path) as window,
    ):
        await window.go(await address_of(up), width=360, height=740)
        await window.eventually("document.querySelectorAll('#nodes tr').length === 5")
        await window.eventually("rounds.length > 3")
        await window.eventually("document.getElementById('state').textContent === 'training'")
        assert await window.js("document.documentElement.scrollWidth <= 360"), "nothing is cut off on a phone"
        for chart in ("loss", "accuracy", "speed", "bytes", "step", "served"):
            assert await window.js(f"document.querySelectorAll('#{chart} svg path, #{chart} svg rect').length > 0"), (
                chart
            )
        assert await window.barriers() == []
        # A chart that has the focus is read point by point with the arrow keys.
        await window.js("document.getElementById('loss').focus()")
        await window.press("\ue011", "\ue014")  # Home, right
        assert (await window.js("document.activeElement.getAttribute('aria-valuetext')")).startswith(
            "round 2 · training "
        )
        # One client among many is chosen by name, and then has lines and figures of its own in both charts.
        await window.js("document.getElementById('each-training').click()")
        await window.js("document.getElementById('one').value = 'client-1'")
        await window.js("document.getElementById('one').dispatchEvent(new Event('change'))")
        read = "document.querySelector('#{} .read').textContent"
        colours: list[str] = []
        for chart, lines in (("loss", 8), ("accuracy", 4)):
            assert await window.js(f"document.querySelectorAll('#{chart} svg path').length") == lines
            assert await window.js(f"{read.format(chart)}.includes('(lowest client-')")
            assert await window.js(f"{read.format(chart)}.includes(' · client-1: ')")
            lines_of = f"[...document.querySelectorAll('#{chart} svg path')].map(line => getComputedStyle(line).stroke)"
            colours.append(await window.js(f"{lines_of}.at(-1)"))
            assert await window.js(f"{lines_of}.filter(colour => colour === '{colours[0]}').length") == lines // 2
        assert colours[0] == colours[1], "a client has one colour in all charts, and no other has it"
        assert await window.barriers() == []
        await window.eventually("document.querySelector('#nodes').textContent.includes('● there')")
        shown = await window.js("rounds.at(-1).round")
        await window.eventually(f"rounds.at(-1).round > {shown}")
        port = await window.js("location.port")
        assert await window.complaints() == []
        up.signal(signal.SIGINT)
        await up.ended()
        await window.eventually("!document.getElementById('lost').hidden")
        async with command("dash", "--port", port, cwd=tmp_path):  # it comes back by itself with whoever serves there
            await window.eventually("document.getElementById('lost').hidden")
            await window.eventually("document.getElementById('state').textContent.startsWith('nobody is there')")
        assert [line for line in await window.complaints() if "net::ERR_" not in line] == []
