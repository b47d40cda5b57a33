"""Options that name a path: ~ is the home folder in every job; and the ways in which people start jobs."""
import io
import os
import re
import subprocess
import sys

import pytest
from repository import JOBS, ROOT

import convert_checkpoint
import davis_metrics
import eval_video_segmentation
import main_selfpatch
import visualize
from selfpatch.errors import ArgumentParser, Number, run_main

HOME = os.path.expanduser("~")


@pytest.mark.parametrize("parser, words, options", [
    (main_selfpatch, ["--data_path=~/images", "--output_dir=~/x"], ["data_path", "output_dir"]),
    (eval_video_segmentation, ["--data_path=~/d", "--output_dir=~/x", "--pretrained_weights=~/w.pth"],
     ["data_path", "output_dir", "pretrained_weights"]),
    (davis_metrics, ["--davis_path=~/d", "--results_path=~/x"], ["davis_path", "results_path"]),
    (visualize, ["overlay", "--davis_path=~/d", "--results", "~/x", "--output=~/o.gif"], ["davis_path", "output"]),
    (visualize, ["attention", "--image_path=~/i.jpg", "--pretrained_weights=~/w", "--output=~/o.png"],
     ["image_path", "pretrained_weights", "output"]),
    (convert_checkpoint, ["~/a.pth", "~/b.pth", "--to", "timm"], ["input", "output"])])
def test_tilde_is_the_home_folder(parser, words, options):
    args = parser.get_args_parser().parse_args(words)
    for name in options:
        assert str(getattr(args, name)).startswith(f"{HOME}/"), name


@pytest.mark.parametrize("limits, text, says", [
    ({"kind": int, "least": 1}, "0", "it is 0, and must be at least 1"),
    ({"kind": int}, "1.5", "invalid int value: '1.5'"),
    ({"kind": float, "above": 0}, "nan", "it is nan, and must be above 0 and finite"),
    ({"kind": float, "above": 0}, "inf", "it is inf, and must be above 0 and finite"),
    ({"kind": float, "above": -1, "below": 1}, "1", "it is 1.0, and must be above -1 and below 1")])
def test_numbers_out_of_range(limits, text, says, capsys):
    parser = ArgumentParser()
    parser.add_argument("--x", type=Number(**limits))
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--x", text])
    assert end.value.code == 2 and f"argument --x: {says} (--help" in capsys.readouterr().err
    assert parser.parse_args(["--x", "0.5" if limits["kind"] is float else "2"]).x in (0.5, 2)


@pytest.mark.parametrize("words, says", [([], "2?2 patches\n"), (["--help"], "4?4 patches")])
def test_an_output_that_cannot_encode_gets_replacements(monkeypatch, words, says):
    """PYTHONIOENCODING=ascii, or LC_ALL=C without UTF-8 mode."""
    parser, output = ArgumentParser(description="Draws.\n\nMore"), io.BytesIO()
    parser.add_argument("--size", help="4×4 patches")
    monkeypatch.setattr("sys.argv", ["job.py", *words])
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, "ascii", write_through=True))
    with pytest.raises(SystemExit) as end:
        run_main(lambda args: print("2×2 patches"), parser)
    assert not end.value.code and says in output.getvalue().decode("ascii") and b"More" not in output.getvalue()


@pytest.mark.parametrize("output, words, status, says", [
    *((output, [word], 141, "") for output in ("", "PYTHONUNBUFFERED=1") for word in ("1", "100_000")),
    ("", ["--help"], 141, ""),
    ("", ["-1"], 75, "job.py: saved\n"), ("2>&1", ["-1"], 75, ""), (">&-", ["1"], 0, ""),
    (">&-", ["-1"], 75, "job.py: saved\n"),
    *((">/dev/full", [word], 2, "job.py: error: the output cannot be written (No space left on device)\n")
      for word in ("1", "100_000", "--help")), (">/dev/full 2>&1", ["-1"], 75, "")])
def test_an_output_that_cannot_be_written(tmp_path, output, words, status, says):
    """As of job.py | head: no traceback, and the status of other programs; an error is told, and its status kept."""
    read, write = os.pipe()
    os.close(read)
    (tmp_path / "job.py").write_text("""from selfpatch.errors import ArgumentParser, RunStopped, run_main

def main(args):
    print(args.length * "x")
    if args.length < 0:
        raise RunStopped("saved")

parser = ArgumentParser()
parser.add_argument("length", type=int)
run_main(main, parser)""")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = ["sh", "-c", f'{output} "$@"', "sh", sys.executable, tmp_path / "job.py", *words]
    result = subprocess.run(words, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=write, stderr=subprocess.PIPE,
                            text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (status, says)


def test_errors_of_other_files_are_not_taken_for_the_outputs(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        run_main(os.write, write, b"x")
    os.close(write)
    output = open("/dev/full", "w")
    monkeypatch.setattr("sys.stdout", output)
    with pytest.raises(FileNotFoundError):
        run_main(lambda: print("x") or open("no such file"))
    with pytest.raises(OSError, match="No space"):
        output.close()


@pytest.mark.parametrize("encoding, ends", [("ascii", SystemExit), ("utf-8", UnicodeEncodeError)])
def test_a_path_that_the_locale_cannot_encode(monkeypatch, capsys, encoding, ends):
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: encoding)
    with pytest.raises(ends):
        run_main("fü.jpg".encode, "ascii")
    said = "'f\\xfc.jpg' cannot be encoded in ascii: set PYTHONUTF8=1" in capsys.readouterr().err
    assert said == (encoding == "ascii")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_job_puts_the_checkout_first(path):
    """Under python -P and -I, and PYTHONSAFEPATH=1, Python itself does not; nor may there be an installed package."""
    here = r"Path\(__file__\)\.resolve\(\)\.parent"
    root = here if path.parent == ROOT else rf"(?:ROOT|{here}s\[1\])"
    before, after = re.split(rf"sys\.path\.insert\(0, str\({root}\)\)", path.read_text(), maxsplit=1)
    names = re.findall(r"^(?:import|from) (\w+)", before, re.MULTILINE)
    assert "selfpatch" in after
    assert path.parent.name == "benchmarks" or set(names) <= sys.stdlib_module_names


@pytest.mark.slow
def test_a_job_without_docstrings_and_without_its_folder_on_the_path(tmp_path):
    result = subprocess.run([sys.executable, "-I", "-OO", ROOT / "main_selfpatch.py", "--help"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 0 and "--init_weights" in result.stdout, result.stderr
