"""Find out which proofs of radix_ops/hf/models.json hold for an older transformers, the one at hand: `make models`.

For versions one after another, the newest first: a proof that fails for one of them is not tried for those before it.
"""

from __future__ import annotations

import argparse
import json
import os

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from apart import run_apart
from fold_checks import Refused, Unbuildable
from models_page import page
from prove_models import ROOT, as_json, search_terms
from radix_ops.hf import proofs
from radix_ops.hf.proofs import NUMBER, Proof


def classes_or_failure(model_type: str, listed: Proof) -> list[str] | str:
    """Return the classes of the type's stack in this version, or why the proof doesn't hold for it."""
    if model_type not in CONFIG_MAPPING_NAMES or listed.stack_class is None:
        return "there is no such type"
    try:
        search, found = search_terms(model_type, lambda text: None)
        for name, kinds in listed.values.items():
            for kind in kinds:
                if kind != NUMBER and "." not in name and not name.endswith("layer_types"):
                    search.fits(**{name: kind})
    except (Refused, Unbuildable) as reason:
        return str(reason)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for config in search.refused:
        if proofs.unproven_config(config, listed) is None:
            return f"a config is refused that the proof allows: {config.to_diff_dict()}"
    wanted = {"tokens", "columns"} if listed.positions == "any" else {listed.positions}
    if not wanted <= search.positions:
        return f"positions are {sorted(search.positions)} and not {sorted(wanted)}"
    for name in ("calls", "packing"):
        if getattr(found, name) != getattr(listed, name):
            return f"{name} is {getattr(found, name)}"
    if listed.head_on_rows and not found.head_on_rows:
        return "its language model's head may not run on rows"
    missing = [head for head in listed.heads if head not in found.heads and hasattr(transformers, head)]
    return f"{missing[0]} gives something else" if missing else found.classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one a core)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = ROOT / "radix_ops" / "hf" / "models.json"
    content = json.loads(path.read_text())
    version, newer = transformers.__version__, [content["transformers"], *content["older"]][-1]
    types = [name for name, proof in content["proven"].items() if proof["since"] == newer]
    print(f"{len(types)} types with transformers {version}, after {newer}")
    checks = {name: (classes_or_failure, name, proofs.proofs()[0][name]) for name in types}
    for name, found in run_apart(checks, arguments.jobs):
        if isinstance(found, str):
            print(f"{name}: {found}", flush=True)
        else:
            proof = content["proven"][name]
            proof["since"], proof["classes"] = version, sorted({*proof["classes"], *found})
    content["older"].append(version)
    path.write_text(as_json(content))
    (ROOT / "docs" / "models.md").write_text(page(content))


if __name__ == "__main__":
    main()
