"""The paper's tables on your GPU and weights.

`python -m flowcache_core.lab.paper skyreels --model FILE --text FILE --vae FILE --prompts FILE` drives a running
ComfyUI in which this pack is installed, with the paper's settings (`paper_rows`), on prompts as VBench has them, one a
line, or on Physics-IQ's descriptions.csv, of which the texts are taken. Every video is written as soon as it is made,
as OUT/<row>/videos/<prompt>-0.mp4, where VBench and VBench-Long look for it, or under Physics-IQ's own name; what its
run told lies beside, in OUT/<row>/runs. What is there already, made by the same graph, is not made again, so a run that
was ended goes on when it is started anew.

Several `--server` addresses share the work, one ComfyUI for each GPU; `--part 2/4` makes the second quarter of the
prompts alone, for processes on machines that share OUT. The table, OUT/table.md, is of all videos that are there: each
row's are compared, frame by frame as the files hold them, with the unaccelerated run of the same prompt and seed.
"""

import argparse
import csv
import hashlib
import json
import queue
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..media.video import read_video, save_video
from ..storage.files import check_writable, write_whole
from .comfy import ComfyUI
from .flops import noted_flops
from .paper_rows import MODELS, Files, Model, Row, run_of
from .paper_table import Figures, likeness_of, table

LONGEST_NAME = 255  # bytes, of a file


@dataclass(frozen=True)
class Prompt:
    """A text, and the file that its video becomes."""

    text: str
    file: str
    seed: int


@dataclass(frozen=True)
class Job:
    """One row on one prompt.

    Attributes:
        videos, runs: folders of the row.
    """

    row: Row
    prompt: Prompt
    videos: Path
    runs: Path

    @property
    def video(self) -> Path:
        return self.videos / self.prompt.file

    @property
    def told(self) -> Path:
        """What the run told."""
        return self.runs / f"{Path(self.prompt.file).stem}.json"


def prompts_of(path: Path | None, model: Model, samples: int, seed: int) -> list[Prompt]:
    """Reads prompts: a line each, or the rows of Physics-IQ's descriptions.csv, which names its videos.

    Raises:
        UserError: there are none.
    """
    if path is not None and path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"description", "generated_video_name"} <= rows[0].keys():
            raise UserError(f"{path} has no columns description and generated_video_name; give Physics-IQ's table.")
        return [Prompt(row["description"], Path(row["generated_video_name"]).name, seed) for row in rows]
    texts = list(model.prompts) if path is None else path.read_text(encoding="utf-8").split("\n")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} holds no prompt; write one a line.")
    return [Prompt(text, file_name(text, sample), seed + sample) for text in texts for sample in range(samples)]


def file_name(prompt: str, sample: int) -> str:
    """Names a video as VBench looks for it; what a file's name cannot hold is left out."""
    end = f"-{sample}.mp4"
    name = re.sub(r"[/\0]", "_", prompt).encode()[: LONGEST_NAME - len(end)].decode(errors="ignore")
    return name + end


def folder_name(row: Row) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", row.name.lower()).strip("_")


def jobs_of(model: Model, prompts: Sequence[Prompt], out: Path) -> list[Job]:
    """Lists the work, prompt after prompt."""
    folders = [(row, out / folder_name(row)) for row in model.rows]
    return [Job(row, prompt, folder / "videos", folder / "runs") for prompt in prompts for row, folder in folders]


def part_of(prompts: Sequence[Prompt], part: str) -> list[Prompt]:
    """Takes a part of the prompts, such as 2/4.

    Raises:
        UserError: it is no such part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    number, parts = (int(group) for group in found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        raise UserError(f"The part is '{part}', expected one such as 2/4.")
    return list(prompts[number - 1 :: parts])


class Maker:
    """Makes videos with one ComfyUI.

    Args:
        server: it.
        model, files, windows: of all rows; see `run_of`.
    """

    def __init__(self, server: ComfyUI, model: Model, files: Files, windows: Sequence[int]):
        self.server, self.model, self.files, self.windows = server, model, files, windows
        self.warm = False

    def make(self, job: Job) -> bool:
        """Makes a video unless it is there; says whether it did. A short run before the first loads the model and is
        not counted."""
        run = run_of(self.model, self.files, job.row, job.prompt.text, job.prompt.seed, self.windows)
        graph = hashlib.sha256(json.dumps(run.graph, sort_keys=True).encode()).hexdigest()
        if job.video.exists() and read_told(job).get("graph") == graph:
            return False
        if not self.warm:
            self.server.run(run_of(self.model, self.files, job.row, job.prompt.text, job.prompt.seed + 1, (1,)).graph)
            self.warm = True
        outputs = self.server.run(run.graph)
        reports = [json.loads(outputs[node]["report"][0]) for node in run.reports]
        parts = [self.server.pictures(outputs, node) for node in run.pictures]
        shown = np.concatenate([parts[0], *(part[self.model.overlap :] for part in parts[1:])])
        job.told.unlink(missing_ok=True)  # what it says is of the old video
        save_video(shown, job.video, self.model.fps)
        write_json(job.told, {"graph": graph, "prompt": job.prompt.text, "seed": job.prompt.seed, "reports": reports})
        return True


def make_all(makers: Sequence[Maker], jobs: Sequence[Job]) -> None:
    """Has several ComfyUIs make what is not there yet; each takes the next job when it is done with one.

    Raises:
        UserError: one of them failed; what the others were at is finished first.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failed: list[Exception] = []

    def work(maker: Maker) -> None:
        while not failed:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                made = maker.make(job)
            except Exception as error:  # told by the main thread
                failed.append(error)
                return
            print(f"{'made' if made else 'is there'}: {job.video}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(maker,)) for maker in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def figures_of(model: Model, jobs: Sequence[Job]) -> list[Figures]:
    """Reads what is there into the table's figures, a row each; a prompt counts where all of its rows are made."""
    figures = {row.name: Figures(row) for row in model.rows}
    by_prompt: dict[Prompt, list[Job]] = {}
    for job in jobs:
        by_prompt.setdefault(job.prompt, []).append(job)
    for made in by_prompt.values():
        if not all(job.video.exists() and read_told(job) for job in made):
            continue
        plain, *_ = made
        for job in made:
            told, into = read_told(job), figures[job.row.name]
            reports = told["reports"]
            into.seconds.append(sum(report["seconds"] for report in reports))
            into.flops.append(sum(noted_flops(report, model.config, model.text_tokens) for report in reports))
            into.device_bytes.append(max(report["device_bytes_peak"] for report in reports))
            if job is not plain:
                into.add(_likeness(job, told, plain))
    return list(figures.values())


def _likeness(job: Job, told: dict, plain: Job) -> dict[str, float]:
    """How alike a video is to the unaccelerated one; measured once and kept beside it."""
    of = read_told(plain)["graph"]
    known = told.get("likeness", {})
    if known.get("to") != of:
        known = {"to": of, "values": likeness_of(read_video(job.video), read_video(plain.video))}
        write_json(job.told, told | {"likeness": known})
    return known["values"]


def read_told(job: Job) -> dict:
    """What a run told; nothing where it was ended before it was written."""
    try:
        return json.loads(job.told.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(content)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("family", choices=list(MODELS))
    option("--model", default=Files.model, help="file of ComfyUI's diffusion_models")
    option("--text", default="", help="file of its text_encoders: umt5 XXL (SkyReels), T5 v1.1 XXL (MAGI)")
    option("--vae", default="", help="file of its vae folder")
    option("--prompts", type=Path, help="a file of prompts, one a line, as VBench's, or Physics-IQ's descriptions.csv")
    option("--samples", type=int, default=1, help="videos of each prompt, with seeds one apart (default: %(default)s)")
    option("--chunks", type=int, help="of each window, instead of the paper's")
    option("--seed", type=int, default=1024)
    option("--server", nargs="+", default=["http://127.0.0.1:8188"], help="addresses of ComfyUI, one for each GPU")
    option("--part", default="1/1", help="make this part of the prompts alone, such as 2/4")
    option("--out", type=Path, default=Path("out/paper"), help="folder of videos and table (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = MODELS[options.family]
    written = options.out / "table.md"
    try:
        check_writable(written)
        prompts = prompts_of(options.prompts, model, options.samples, options.seed)
        files = Files(options.model, options.text, options.vae)
        windows = [options.chunks or chunks for chunks in model.windows]
        makers = [Maker(ComfyUI(server), model, files, windows) for server in options.server]
        make_all(makers, jobs_of(model, part_of(prompts, options.part), options.out))
        figures = figures_of(model, jobs_of(model, prompts, options.out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = table(figures)
    write_whole(written, lambda partial: partial.write_text(words + "\n"))
    print(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
