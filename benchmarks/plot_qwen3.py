"""Draw the speed-up of bench_qwen3's saved grid over packed against the fraction of tokens that is shared.

python benchmarks/plot_qwen3.py benchmarks/results/qwen3_cuda.png
"""

from __future__ import annotations

import argparse
import json

import bench_qwen3
import harness


def plot(path: str, device: str) -> None:
    from matplotlib import pyplot

    contents = [json.loads(file.read_text()) for file in sorted(harness.RESULTS.glob(f"qwen3_[!tql]*_{device}.json"))]
    rows = [row for content in contents for row in content["rows"] if " x (" in row["batch"]]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for color, layout in enumerate(bench_qwen3.LAYOUTS):
            for own, line in zip(bench_qwen3.SUFFIXES, "-:", strict=True):
                cells = [r for r in rows if r["model"] == name and r["batch"].endswith(f" + {own})")]
                points = sorted((1 - 1 / r["N/M"], r[f"packed / {layout}"]) for r in cells)
                if points:
                    label = f"{layout}, {own} own tokens"
                    axis.plot(
                        *zip(*points, strict=True), line, color=f"C{color}", marker="o", markersize=3, label=label
                    )
        ideal = sorted((1 - 1 / r["N/M"], r["N/M"]) for r in rows if r["model"] == name)
        axis.plot(*zip(*ideal, strict=True), color="grey", linestyle="--", label="N/M")
        axis.set(title=f"Qwen3 {name}", xlabel="shared fraction of the tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up over packed")
    axes[0][0].legend(fontsize=8)
    environment = contents[0]["environment"]
    figure.suptitle(f"Forward, 15 sequences, {environment.get('gpu', environment['cpu'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="FILE.png")
    parser.add_argument("--device", choices=harness.DEVICES, default="cuda", help="whose results (default: cuda)")
    args = parser.parse_args()
    plot(args.path, args.device)


if __name__ == "__main__":
    main()
