"""The documentation: its commands, its generated page of presets, its tables beside the code."""

import ast
import contextlib
import importlib
import re
import shlex
from pathlib import Path

import docs.presets_page
from data_shards.command_line.settings import settings
from jobs.gate import NOT_PROMOTED
from jobs.scheduling.claims import REFUSED_CODE, STOPPED_CODES
from pipeline.config import RunConfig
from pipeline.presets.registry import PRESETS, run_preset
from pipeline.resilience.hang_detector import HUNG
from pipeline.run import layout

ROOT = Path(__file__).resolve().parents[1]
HOW_TO = sorted((ROOT / "docs/how-to").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "docs/tutorial.md", *HOW_TO]
LONGEST_README = 130
ENTRIES = "pipeline|jobs|data_shards|model|benchmarks"

PRETRAIN, SHARDS = "python -m pipeline.pretrain", "python -m data_shards"
IMAGENET = "imagenet-L32W4096"
RUN_BY = {
    "tests/end_to_end/test_digits.py": {
        "make pretrain": "test_certified_accuracy_reaches_the_published_targets",
        f"{PRETRAIN} digits --train.precision bf16": "test_bf16_ends_close_to_fp32",
    },
    "tests/end_to_end/test_readme.py": {
        "make cluster": "test_no_stranger_reaches_what_make_cluster_starts",
        "export RAY_AUTH_MODE=token": "test_the_job_is_done",
        "ray job submit": "test_the_job_is_done",
    },
    "tests/end_to_end/test_submit.py": {
        f"{PRETRAIN} digits --name mine --start-or-resume": (
            "test_two_submissions_at_once_then_stop_and_resubmit"
        ),
    },
    "tests/end_to_end/test_tutorial.py": dict.fromkeys(
        (
            "python -m jobs.evaluate_cra",
            "python -m model.verify",
            "T=",
            "python -m jobs.gate rule photos",
            "python -m jobs.gate candidate photos",
            "python -m jobs.gate promote photos",
            "python -m jobs.predict models:/photos",
            "python -m jobs.report photos",
        ),
        "test_the_tutorial_leads_from_a_run_to_a_promoted_model",
    ),
    "tests/end_to_end/test_hang.py": {"torchrun": "test_a_stopped_rank"},
    "tests/pipeline/test_exit_codes.py": {f"{PRETRAIN} digits --cluster.launcher local": ""},
    "tests/pipeline/test_object_store.py": {
        f"{PRETRAIN} {IMAGENET} --data.shards s3": "test_the_same_losses_in_bad_weather",
    },
    "tests/pipeline/test_command_line.py": {
        f"{PRETRAIN} --list": "test_the_list_has_every_preset_with_its_facts_in_any_terminal",
        f"{PRETRAIN} digits --help": "test_short_help_is_short_and_has_what_people_change",
        f"{PRETRAIN} digits --train.epochs 20 --print-config": (
            "test_printed_settings_are_a_file_that_makes_the_same_run"
        ),
        f"{PRETRAIN} --config": "test_printed_settings_are_a_file_that_makes_the_same_run",
        f"{PRETRAIN} --resume": "test_resume_takes_the_settings_of_the_run",
        f"{PRETRAIN} --resume --name mine --extend": (
            "test_more_epochs_state_what_they_do_to_the_schedule"
        ),
    },
    "tests/pipeline/test_plan.py": {
        f"python -m pipeline.plan {IMAGENET} --nodes": "test_the_billion_in_json_without_a_gpu",
        f"python -m pipeline.plan {IMAGENET} --measured": (
            "test_what_was_measured_replaces_data_sheets"
        ),
    },
    "tests/pipeline/test_doctor.py": {
        "python -m pipeline.doctor": "test_the_entry_prints_rows_and_its_exit_status_tells",
    },
    "tests/pipeline/test_hostile_tracker.py": {
        "export CERTIFIED_PRETRAIN_ADDRESSES": (
            "test_a_server_that_names_local_files_neither_gets_nor_writes_them"
        ),
    },
    "tests/data_shards/test_imagefolder.py": {
        f"{SHARDS}.write imagefolder": "test_the_command_says_how_to_split",
    },
    "tests/data_shards/test_imagenet.py": {
        f"{SHARDS}.write imagenet": "test_entry_from_another_store_gives_the_same_set",
    },
    "tests/data_shards/test_archives.py": {
        f"{SHARDS}.write tiny-imagenet": "test_tiny_imagenet",
        f"{SHARDS}.write cifar10": "test_cifar",
        f"{SHARDS}.write mnist": "test_mnist",
        f"{SHARDS}.write fashion-mnist": "test_fashion_mnist_of_the_package",
    },
    "tests/data_shards/test_write.py": {f"{SHARDS}.write digits": "test_entry"},
    "tests/data_shards/test_verify.py": {
        f"{SHARDS}.verify": "test_entry_lists_what_is_wrong",
    },
    "tests/data_shards/test_rebuild_index.py": {f"{SHARDS}.verify URL --repair": "test_entry"},
    "tests/data_shards/test_external.py": {f"{SHARDS}.index": "test_a_set_of_stock_webdataset"},
    "tests/data_shards/test_bench.py": {f"{SHARDS}.bench": "test_command"},
    "tests/jobs/test_gate.py": {
        "python -m jobs.gate": "test_the_entry_runs_the_acts_and_tells_the_outcome_by_its_status",
    },
    "tests/jobs/test_predict.py": {
        "python -m jobs.predict": "test_the_entry_writes_json_lines_and_csv",
    },
    "tests/jobs/test_report.py": {"python -m jobs.report": "test_job_writes_both_pages"},
    "tests/jobs/test_schedule.py": {
        "python -m jobs.schedule": "test_once_evaluates_records_and_then_has_nothing_to_do",
    },
    "tests/jobs/test_compare.py": {"python -m jobs.compare": "test_two_presets_on_digits"},
    "tests/jobs/test_mlflow_views.py": {
        "python -m jobs.mlflow_views": "test_job_prints_a_link_for_every_view",
    },
    "tests/benchmarks/test_pieces.py": {
        "python -m benchmarks.calibrate": "test_pieces_are_those_of_all_ranks_and_make_a_step",
    },
    "tests/benchmarks/test_gpu_day.py": {
        "python -m benchmarks.gpu_day run": "test_every_part_leaves_what_it_said_and_how_it_ended",
        "python -m benchmarks.gpu_day take": "test_what_a_gpu_has_measured_goes_to_the_results",
        "python -m benchmarks.gpu_day wheels": "test_the_wheels_are_pinned_and_may_not_grow",
    },
    "tests/benchmarks/test_network_step.py": {
        "python -m benchmarks.network_step": "test_without_a_gpu_its_rows_say_so",
    },
}
"""The test that runs a command, or its entry on a smaller input, by the command's beginning: the
longest one that fits counts. Without a name all tests of the file do."""
NOT_RUN = {
    "make ui": "runs until it is ended; tests/end_to_end/test_browser.py opens such a server",
    "make test": "is what runs the tests",
    ". .venv/bin/activate": "of the shell",
    "python -m pytest -m gpu": "needs a GPU",
    f"{SHARDS}.write synthetic": "gigabytes, for a measurement on a GPU",
    f"{PRETRAIN} imagenet-L32W4096 --cluster.launcher local": "a measurement on a GPU",
    f"{PRETRAIN} cifar10-L32W2048 --cluster.launcher local": "a measurement on a GPU",
    "pip install --no-index": "on a machine with a GPU; tests/benchmarks/test_bare_machine.py "
    "trains with the same packages",
    "docker build": "needs Docker; tests/jobs/test_kubernetes.py reads the Dockerfile",
    "kubectl": "needs Kubernetes; tests/jobs/test_kubernetes.py parses the manifests' commands",
    "export RAY_AUTH_MODE=token RAY_JOB": "on the machines of a cluster; `make cluster` sets both",
    "ray start": "on the machines of a cluster; `make cluster` starts one",
    f"{PRETRAIN} lipnext-S": (
        "minutes of training; tests/pipeline/test_fit_to_data.py resolves its settings"
    ),
    "(umask 077;": "writes into the home folder; `make cluster` has the same line",
}
"""Why a command is run by no test, by its beginning."""
TEST_OF = {start: (file, test) for file, run in RUN_BY.items() for start, test in run.items()}


def commands():
    """Every line of a block of shell, without comments, with the page it is on."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if command := " ".join(re.sub(r"\s#.*$", "", line).split()):
                    yield page.name, command


def longest(command):
    """The longest beginning of TEST_OF or NOT_RUN that fits; None if none does."""
    fitting = [start for start in (*TEST_OF, *NOT_RUN) if command.startswith(start)]
    return max(fitting, key=len, default=None)


def test_every_command_is_run_by_a_test_or_says_why_not():
    assert not TEST_OF.keys() & NOT_RUN.keys()
    used = {longest(command): (page, command) for page, command in commands()}
    assert None not in used, used[None]
    assert (TEST_OF.keys() | NOT_RUN.keys()) - used.keys() == set()
    for file, test in TEST_OF.values():
        assert (f"def {test}(" if test else "def test_") in (ROOT / file).read_text(), test


def flags_of(module, first, capsys, monkeypatch):
    """What the help of an entry names, with the subcommand or preset that comes first."""
    if module == "pipeline.pretrain":
        known = settings(RunConfig, run_preset(first if first in PRESETS else "digits"))
        words = {word for one in known for word in (one.flag, one.negated)}
        return words | {"--list", "--help", "--print-config", "--config"}
    with_subcommands = ("data_shards.write", "jobs.gate", "benchmarks.gpu_day")
    subcommand = [first] if module in with_subcommands else []
    entry = importlib.import_module(module.replace("model.verify", "model.verifier.command"))
    monkeypatch.setattr("sys.argv", [module, *subcommand, "--help"])
    with contextlib.suppress(SystemExit):
        entry.main()
    return set(re.findall(r"--[\w.-]+", capsys.readouterr().out))


def test_every_flag_of_a_command_is_one_of_its_entry(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    asked = {}
    for _, command in commands():
        if match := re.search(rf"-m ((?:{ENTRIES})\.\w+) ?(.*)", command):
            words = shlex.split(match[2])
            first = words[0] if words and not words[0].startswith("-") else ""
            flags = asked.setdefault((match[1], first), set())
            flags.update(word for word in words if word.startswith("--"))
    assert len(asked) > 25
    for (module, first), flags in asked.items():
        assert not flags or flags <= flags_of(module, first, capsys, monkeypatch), (module, first)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_the_reference_of_presets_is_current():
    assert docs.presets_page.PAGE.read_text() == docs.presets_page.page(), (
        "python -m docs.presets_page writes it"
    )


def test_every_metric_is_in_the_reference_and_every_one_there_is_recorded():
    groups = "train|data|perf|checkpoint|orthogonality|cost|faults|gate"
    recorded = {
        node.value
        for package in ("pipeline", "jobs")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(rf"(?:{groups})/\w+", node.value)
    }
    page = (ROOT / "docs/reference/metrics.md").read_text()
    assert set(re.findall(rf"`((?:{groups})/\w+)`", page)) == recorded
    assert len(recorded) > 30


def test_every_file_of_a_run_is_in_the_reference():
    page = (ROOT / "docs/reference/files.md").read_text()
    values = [value for name, value in vars(layout).items() if name.isupper()]
    names = [value for value in values if isinstance(value, str)]
    assert len(names) > 15
    for name in names:
        stem, dot, suffix = name.partition(".")
        assert re.search(rf"\b{stem}(-\d+)?{re.escape(dot + suffix)}", page), name


def test_exit_codes_are_those_of_the_code():
    page = (ROOT / "docs/reference/exit-codes.md").read_text()
    of_runs = [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert of_runs == [0, 1, REFUSED_CODE, HUNG, *STOPPED_CODES]
    (row,) = re.findall(r"^\| entry \|(.*)\|$", page, re.MULTILINE)
    assert int(row.split("|")[-1]) == NOT_PROMOTED
