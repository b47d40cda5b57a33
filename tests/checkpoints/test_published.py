"""Weights in other libraries' folders, at an address and on the Hugging Face Hub, offline: each is the same network."""
import functools
import hashlib
import http.server
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from forked import run_ranks
from golden_rules import set_weights
from huggingface_hub.errors import RepositoryNotFoundError

import main_selfpatch
from selfpatch.checkpoints import published
from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.loading import load_backbone, load_with_info
from selfpatch.checkpoints.published import resolve_path
from selfpatch.distributed.processes import init_distributed_mode
from selfpatch.evaluation.model_options import load_candidates
from selfpatch.method.vision_transformer import vit_tiny
from selfpatch.pretraining.options import check_options


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with weights.pth and weights.safetensors of one network."""
    folder = tmp_path_factory.mktemp("weights")
    state = set_weights(vit_tiny(patch_size=32), 0).state_dict()
    torch.save(state, folder / "weights.pth")
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1, and lists what was asked for."""

    def __init__(self, folder):
        server, self.asked = self, []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                super().do_GET()

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.folder, self.address = folder, f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def put(file: Path, to: Path):
    to.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copy(file, to)


def assert_loads(path, weights):
    assert torch.equal(load_backbone(path).pos_embed, torch.load(weights / "weights.pth")["pos_embed"])


@pytest.mark.parametrize("name, source", [
    ("model.safetensors", "weights.safetensors"), ("pytorch_model.bin", "weights.pth"),
    ("checkpoint.pth", "weights.pth")])
def test_folders(tmp_path, weights, name, source):
    put(weights / source, tmp_path / name)
    assert_loads(tmp_path, weights)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="Is a directory without checkpoint.pth, model.safetensors, pytorch_mod"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("config, heads", [
    ({"num_attention_heads": 6}, 6), ({"model_args": {"num_heads": 6, "patch_size": 32}}, 6), ({"hidden_size": 192}, 3),
    ([], 3)])
def test_the_config_tells_the_number_of_heads(tmp_path, weights, config, heads):
    put(weights / "weights.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = load_with_info(tmp_path)
    assert model.num_heads == heads and (info.heads_from == "recorded") is (heads == 6)


@pytest.mark.parametrize("content", ['{"num_attention', "[" * 100_000])
def test_a_config_that_is_cut_off(tmp_path, weights, content):
    put(weights / "weights.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json cannot be read .*download or copy it again"):
        load_backbone(tmp_path)


def test_an_address_is_downloaded_once(server, weights, capsys):
    digest = hashlib.sha256((weights / "weights.pth").read_bytes()).hexdigest()
    put(weights / "weights.pth", server.folder / f"vit-{digest[:8]}.pth")
    url = f"{server.address}/vit-{digest[:8]}.pth?download=1"
    for _ in range(2):
        assert_loads(url, weights)
    assert len(server.asked) == 1 and capsys.readouterr().err.count(f"downloading {url} to ") == 1
    assert not [path for path in resolve_path(url).parent.iterdir() if path.suffix in (".tmp", ".partial")]


@pytest.mark.parametrize("name", ["vit-20240131.pth", "vit-b16.pth"])
def test_dates_and_names_are_no_checksums(server, weights, name):
    put(weights / "weights.pth", server.folder / name)
    assert_loads(f"{server.address}/{name}", weights)


def test_equal_names_at_two_addresses_are_two_files(server, weights, tmp_path):
    """The cache of torch.hub knows files by their last name alone; what lies there already is not ours."""
    for folder, number in (("a", 1.0), ("b", 2.0)):
        (server.folder / folder).mkdir()
        state = vit_tiny(patch_size=56).state_dict()
        torch.save(state | {"pos_embed": torch.full_like(state["pos_embed"], number)},
                   server.folder / folder / "checkpoint.pth")
    foreign = put(weights / "weights.pth", tmp_path / "torch" / "hub" / "checkpoints" / "checkpoint.pth")
    before = Path(foreign).read_bytes()
    for folder, number in (("a", 1.0), ("b", 2.0), ("a", 1.0)):
        assert (load_backbone(f"{server.address}/{folder}/checkpoint.pth").pos_embed == number).all()
    assert Path(foreign).read_bytes() == before


@pytest.mark.parametrize("name, content, says", [
    ("vit-01234567.pth", None, r"cannot be downloaded: invalid hash value \(expected \"01234567\", got"),
    ("vit.pth", lambda data: data[:-1000], "is truncated: download"),
    ("vit.pth", lambda data: b"<!DOCTYPE html><html>Please log in</html>", "is an HTML page"),
    ("vit.pth", lambda data: b"", r"is empty \(0 bytes\)")])
def test_a_download_that_is_no_checkpoint_is_not_kept(server, weights, tmp_path, name, content, says):
    data = (weights / "weights.pth").read_bytes()
    (server.folder / name).write_bytes(content(data) if content else data)
    with pytest.raises(CheckpointError, match=f"^{server.address}/{name} {says}") as error:
        load_backbone(f"{server.address}/{name}")
    assert str(tmp_path / "torch") not in str(error.value)
    put(weights / "weights.pth", server.folder / "vit.pth")  # and the next attempt downloads anew
    assert_loads(f"{server.address}/vit.pth", weights)


@pytest.mark.parametrize("url, says", [("{}/none.pth", "HTTP Error 404: "),
                                       ("http://127.0.0.1:1/vit.pth", "refused"), ("http://[::1", "Invalid IPv6"),
                                       ("https://", "no host given")])
def test_addresses_without_an_answer(server, url, says):
    with pytest.raises(CheckpointError, match=f"cannot be downloaded: .*({says})"):
        load_backbone(url.format(server.address))


def test_a_server_that_falls_silent(server, monkeypatch):
    monkeypatch.setattr(published, "TIMEOUT", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", lambda _: ended.wait(20))
    with pytest.raises(CheckpointError, match="cannot be downloaded: .*timed out"):
        load_backbone(f"{server.address}/vit.pth")
    ended.set()


def test_a_name_never_leads_out_of_the_cache(server, tmp_path, weights):
    for name in ("..", "%2e%2e", ".hidden", "x" * 300):
        with pytest.raises(CheckpointError):
            load_backbone(f"{server.address}/{name}")
    files = [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    assert files and all(path.parent.parent == tmp_path / "torch" / "hub" / "checkpoints" / "selfpatch"
                         for path in files)


def load_on_each_rank(url: str) -> None:
    init_distributed_mode("cpu")
    load_candidates([url])
    load_backbone(url)  # and without any agreement between ranks


def test_one_rank_downloads(server, weights):
    put(weights / "weights.pth", server.folder / "vit.pth")
    run_ranks(load_on_each_rank, f"{server.address}/vit.pth", count=2)
    assert server.asked == ["/vit.pth"]


def download_at_once(url: str) -> None:
    load_backbone(url)


def test_processes_that_do_not_know_of_each_other_download_once(server, weights):
    put(weights / "weights.pth", server.folder / "vit.pth")
    run_ranks(download_at_once, f"{server.address}/vit.pth", count=2)
    assert server.asked == ["/vit.pth"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline cache of the Hub: put(NAME, FILE, SOURCE) adds a file to a repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, file, content):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        for folder in ("refs", "blobs", f"snapshots/{'0' * 40}"):
            (repository / folder).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text("0" * 40)
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = repository / "snapshots" / ("0" * 40) / file
        link.symlink_to(os.path.relpath(blob, link.parent))
    return add


def test_the_hub(hub, weights):
    hub("someone/vit", "model.safetensors", (weights / "weights.safetensors").read_bytes())
    assert_loads("hf-hub:someone/vit", weights)
    assert_loads("hf-hub:someone/vit@main", weights)
    hub("someone/vit", "config.json", b'{"num_attention_heads": 6}')
    assert load_backbone("hf-hub:someone/vit").num_heads == 6
    hub("someone/older", "pytorch_model.bin", (weights / "weights.pth").read_bytes())
    assert_loads("hf-hub:someone/older", weights)


@pytest.mark.parametrize("name", ["someone/none", "a/b/c", "", "someone/vit@none", "../../etc"])
def test_what_the_hub_does_not_have(hub, weights, name):
    hub("someone/vit", "model.safetensors", (weights / "weights.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"^hf-hub:{name} cannot be downloaded: "):
        load_backbone(f"hf-hub:{name}")


def test_what_the_hub_refuses(monkeypatch):
    def refuse(*_, **__):
        raise RepositoryNotFoundError("404 Client Error.\n\nPlease make sure",
                                      response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=r"^hf-hub:someone/none cannot be downloaded: 404 Client Error\.$"):
        load_backbone("hf-hub:someone/none")


def test_pretraining_accepts_each_form_before_anything_is_downloaded(tmp_path, image_folder, weights):
    def check(given):
        check_options(vars(main_selfpatch.get_args_parser().parse_args(
            ["--data_path", str(image_folder), "--output_dir", str(tmp_path), "--init_weights", given])))

    for given in ("http://127.0.0.1:1/vit.pth", "hf-hub:someone/none", f"https://host/{'x' * 300}",
                  str(weights / "weights.pth")):
        check(given)
    with pytest.raises(ValueError, match="there is no file .*none.pth: give --init_weights a checkpoint of any"):
        check(str(tmp_path / "none.pth"))
