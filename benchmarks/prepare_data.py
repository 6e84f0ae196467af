"""Measures the speed and memory of ``m1 prepare-data`` on a folder of JSON Lines, each run a process of its own.

    python benchmarks/prepare_data.py CORPUS_DIR --tokenizer tokenizer.json [--repeat 3]

Prints MB of UTF-8 text per CPU second (user + system of the whole process, imports and tokenizer loading included) and
peak memory, exact deduplication on, for the fast engine and for the same work with the tokenizers library as encoder.
Without arguments it makes 40 MB of text from the standard library and trains a small tokenizer first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

RUN = """
import json, resource, sys
from pathlib import Path
from m1_data.prepare.run import prepare
from m1_data.spec import PrepareSpec, SourceSpec, TokenizerSpec
job = json.loads(sys.argv[1])
sources = tuple(
    SourceSpec(name=Path(f).name.split(".")[0].replace(" ", "_"), domain="code", format="jsonl", path=f) for f in job["files"]
)
spec = PrepareSpec(out=job["out"], sources=sources, engine=job["engine"])
manifest, _ = prepare(spec, TokenizerSpec(path=job["tokenizer"]), [], base_dir=Path("."), length_scale=1.0)
use = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "bytes": sum(s.utf8_bytes for s in manifest.sources), "tokens": sum(s.tokens for s in manifest.sources),
    "cpu_s": use.ru_utime + use.ru_stime, "peak_gb": use.ru_maxrss / 1e6,
}))
"""


def main() -> None:
    """Measure and print one row per engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus, tokenizer = arguments.corpus, arguments.tokenizer
        if corpus is None or tokenizer is None:
            corpus, tokenizer = make_corpus(work)
        files = [str(f) for f in sorted(corpus.glob("*.jsonl*"))]
        print(f"{'engine':<12}{'MB':>8}{'Mtokens':>9}{'CPU s':>8}{'MB/CPU s':>10}{'peak GB':>9}")
        for engine in ("gigatoken", "tokenizers"):
            runs = [measure(work / f"out-{engine}-{n}", engine, files, tokenizer) for n in range(arguments.repeat)]
            cpu = statistics.median(r["cpu_s"] for r in runs)
            peak = max(r["peak_gb"] for r in runs)
            size, tokens = runs[0]["bytes"] / 1e6, runs[0]["tokens"] / 1e6
            print(f"{engine:<12}{size:>8.1f}{tokens:>9.2f}{cpu:>8.2f}{size / cpu:>10.1f}{peak:>9.2f}", flush=True)


def measure(out: Path, engine: str, files: list[str], tokenizer: Path) -> dict[str, float]:
    """Prepare once in a fresh process; return its bytes of text, tokens, CPU seconds and peak memory in GB."""
    job = json.dumps({"out": str(out), "engine": engine, "files": files, "tokenizer": str(tokenizer.resolve())})
    done = subprocess.run([sys.executable, "-c", RUN, job], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def make_corpus(work: Path) -> tuple[Path, Path]:
    """Write standard-library sources, several times with different first lines, and a 32k tokenizer; return both paths."""
    from m1_data.spec import TokenizerSpec
    from m1_data.tokenizer import train_tokenizer

    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
    corpus = work / "corpus"
    corpus.mkdir()
    copies = max(1, 40_000_000 // sum(map(len, texts)))
    with (corpus / "stdlib.jsonl").open("w") as file:
        for copy in range(copies):
            for text in texts:
                file.write(json.dumps({"text": f"# copy {copy}\n{text}"}) + "\n")
    tokenizer = work / "tokenizer.json"
    tokenizer.write_bytes(train_tokenizer(iter(texts), TokenizerSpec(vocab_size=32_000)).json_bytes)
    return corpus, tokenizer


if __name__ == "__main__":
    main()
