"""The hub with a local folder in its place, and `scale_sae_jax.load` by path and by name."""

import fnmatch
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from saes import assert_same_function, experts, plain, run

import scale_sae_jax
from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import hub, origin, sae_lens, sparsify
from scale_sae_jax.parallel.mesh import make_mesh


class FolderHub:
    """Repositories as folders of `root`: what is used of HfApi, and of snapshot_download."""

    def __init__(self, root):
        self.root, self.fetched = root, []

    def create_repo(self, repo, private, exist_ok):
        (self.root / "repos" / repo).mkdir(parents=True, exist_ok=exist_ok)

    def file_exists(self, repo, name):
        return (self.root / "repos" / repo / name).is_file()

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / "repos" / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo, allow_patterns):
        source, target = self.root / "repos" / repo, self.root / "cache" / repo
        if not source.is_dir():
            raise ConnectionError(repo)
        for path in (path for path in source.rglob("*") if path.is_file()):
            name = path.relative_to(source).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
                self.fetched.append(name)
        target.mkdir(parents=True, exist_ok=True)
        return str(target)


@pytest.fixture
def local(tmp_path, monkeypatch):
    api = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", api.snapshot_download)
    return api


def test_pushed_autoencoders_come_back_by_name(local):
    first, second, third = plain("gated"), plain("topk"), experts()
    about = {"model_name": "gpt2"}
    name = hub.push_to_hub(*first[:2], "someone/saes", "layers.8", about, api=local)
    assert name == "someone/saes:layers.8"
    readme = (local.root / "repos/someone/saes/README.md").read_text()
    assert readme.startswith("---\nlibrary_name: saelens\n") and "plugin" not in readme
    assert_same_function(first[:2], scale_sae_jax.load("someone/saes"), first[2])
    hub.push_to_hub(*second[:2], "someone/saes", "deep/layers.9", api=local)
    assert (local.root / "repos/someone/saes/README.md").read_text() == readme
    with pytest.raises(UserError, match=r"2 autoencoders \(deep/layers.9, layers.8\)"):
        scale_sae_jax.load("someone/saes")
    local.fetched.clear()
    loaded = scale_sae_jax.load("someone/saes:deep/layers.9")
    assert_same_function(second[:2], loaded, second[2])
    expected = {f"deep/layers.9/{name}" for name in ("cfg.json", "sae_weights.safetensors")}
    assert set(local.fetched) == expected
    many = hub.push_to_hub(*third[:2], "someone/experts", "layers.8", private=True, api=local)
    assert "sae_lens_plugin" in (local.root / "repos/someone/experts/README.md").read_text()
    ours, back = (sae_lens.describe(*s, {}) for s in (third[:2], scale_sae_jax.load(many)))
    assert ours[0] == back[0]
    jax.tree.map(np.testing.assert_allclose, ours[1], back[1])


def test_sparsify_repositories_load_too(local):
    sae, params, x = plain("topk")
    sparsify.save(sae, params, local.root / "repos/someone/sparse", "layers.8")
    (local.root / "repos/someone/sparse/extra.pkl").write_text("never fetched")
    assert_same_function((sae, params), scale_sae_jax.load("someone/sparse"), x)
    assert not any("pkl" in name for name in local.fetched)


def test_names_and_failures_are_told_in_one_line(local, tmp_path):
    sae, params, _ = plain("topk")
    hub.push_to_hub(sae, params, "someone/saes", "layers.8", api=local)
    for name, reason in (
        ("nobody/nothing", r"cannot be had from the hub \(ConnectionError\)"),
        ("someone/saes:layers.9", "has no layers.9/cfg.json"),
        ("someone/saes:../saes", "plain relative name"),
    ):
        with pytest.raises(UserError, match=reason):
            scale_sae_jax.load(name)
    for repo, sae_id, reason in (
        ("saes", "layers.8", "write owner/name"),
        ("../x", "layers.8", "write owner/name"),
        ("someone/saes", "../up", "plain relative name"),
    ):
        with pytest.raises(UserError, match=reason):
            hub.push_to_hub(sae, params, repo, sae_id, api=local)
    local.root = tmp_path / "hub/repos/someone/saes/README.md"  # no folder: nothing can be made
    with pytest.raises(UserError, match="cannot be written to on the hub"):
        hub.push_to_hub(sae, params, "someone/saes", "layers.8", api=local)


def test_names_of_folders_are_not_made_public(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/model").mkdir(parents=True)
    for hub_name in ("gpt2", "EleutherAI/pythia-70m", "nobody/has.such-v1.5"):
        assert origin.public_name(hub_name) == hub_name
    for path in ("mine/model", "/a/model", "../a/model", "~/a/model", "~nobody/model",
                 "gone/since/model"):
        assert origin.public_name(path) == "model"
    assert origin.public_name("secret/notes.jsonl") == "notes.jsonl"
    assert origin.public_name("package:pydoc") == "pydoc"


def test_load_finds_the_format_of_a_folder(tmp_path, monkeypatch):
    sae, params, x = plain("topk")
    sae_lens.save(sae, params, tmp_path / "lens/one")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same_function((sae, params), scale_sae_jax.load("~/lens/one"), x)
    sparsify.save(sae, params, tmp_path / "sparse", "layers.8")
    for path in ("lens", "lens/one", "sparse", "sparse/layers.8"):
        assert_same_function((sae, params), scale_sae_jax.load(tmp_path / path), x)
    sae_lens.save(sae, params, tmp_path / "lens/two")
    with pytest.raises(UserError, match=r"2 autoencoders \(one, two\): name one"):
        scale_sae_jax.load(tmp_path / "lens")
    with pytest.raises(UserError, match="is not the folder of a run, and has no checkpoint 3"):
        scale_sae_jax.load(tmp_path / "sparse", 3)
    for path, what in ((tmp_path, "holds no autoencoder"), (tmp_path / "absent", "is no folder")):
        with pytest.raises(UserError, match=f"{path} {what}: name the --workdir of a run, or"):
            scale_sae_jax.load(path)


def test_load_onto_a_mesh(tmp_path):
    sae, params, x = experts(active=2, topk_scope="token", latents=40, experts=4)
    sae_lens.save(sae, params, tmp_path / "out")
    mesh = make_mesh("data:1,expert:2", 4, jax.devices()[:2])
    split, on_two = scale_sae_jax.load(tmp_path / "out", mesh=mesh)
    assert len(on_two["w_enc"].sharding.device_set) == 2
    x_hat = jax.jit(split.reconstruct)(on_two, x)
    np.testing.assert_allclose(x_hat, run(sae, params, x)[1], atol=1e-4)
