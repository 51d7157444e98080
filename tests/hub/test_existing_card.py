"""Publishing again to a local Hub: additions to the card are kept, and the generated text is updated."""

import json
import socket

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from tests.hub.conftest import bits_per_byte_scores, commonsense_scores, files_on_hub, put_on_hub
from tinyllama_hf.errors import InputError
from tinyllama_hf.hub.access import explain_errors
from tinyllama_hf.hub.card_file import BEGIN, END, merge_card, read_card, write_card
from tinyllama_hf.hub.publish import plan_revisions, publish


REPO = "demo/micro"


def card_on_hub(hub, branch: str = "main") -> str:
    return files_on_hub(hub, REPO)[branch]["README.md"].decode()


def test_license_metadata_text_and_files_of_others_stay(run, online, no_pictures):
    """The license of the first call and edits on the Hub are kept, on main and on the branch of a milestone."""
    publish(run, REPO, license="apache-2.0")
    name = next((run / "milestones").iterdir()).name
    for branch in ("main", name):
        card = card_on_hub(online, branch).replace("tags:\n", "language: sv\ndatasets:\n- me/data\ntags:\n- small\n")
        card = (
            card.replace(BEGIN, f"Text above, by {branch}.\n\n{BEGIN}")
            + "\n## Thanks\n\nTo all, with ![us](us.png).\n"
        )
        put_on_hub(
            online, REPO, {"README.md": card.encode(), "us.png": b"\x89PNG", "gguf/model-q8_0.gguf": b"GGUF"}, branch
        )
    assert [published.changed for published in publish(run, REPO)] == [[], [], []], "nothing of ours has changed"

    scores = json.loads((run / "scores.json").read_text())
    for row in scores["models"]:
        row["bits_per_byte"] = row["by_source"][scores["data"][0]["path"]] = 2.125
    (run / "scores.json").write_text(json.dumps(scores))
    publish(run, REPO)
    for branch in ("main", name):
        files = files_on_hub(online, REPO)[branch]
        card = ModelCard(files["README.md"].decode())
        fields = card.data.to_dict()
        assert (fields["license"], fields["language"], fields["datasets"]) == ("apache-2.0", "sv", ["me/data"])
        assert sorted(fields["tags"]) == ["llama", "small", "tinyllama_hf"]
        assert card.text.count(f"Text above, by {branch}.") == card.text.count("To all, with ![us](us.png).") == 1
        assert "**2.1250**" in card.text and card.data.eval_results[0].metric_value == 2.125
        assert card.text.count(BEGIN) == card.text.count(END) == card.text.count("# micro\n") == 1
        assert (files["us.png"], files["gguf/model-q8_0.gguf"]) == (b"\x89PNG", b"GGUF")


def test_a_new_milestone_has_the_license_of_the_repository(run, online, no_pictures):
    newest = sorted((run / "milestones").iterdir(), key=lambda path: int(path.name.split("-")[1]))[1]
    newest.rename(run / newest.name)
    publish(run, REPO, license="mit")
    (run / newest.name).rename(newest)
    publish(run, REPO)
    cards = [ModelCard(files["README.md"].decode()) for files in files_on_hub(online, REPO).values()]
    assert [card.data.license for card in cards] == ["mit"] * 3


@pytest.mark.parametrize("touched", [False, True])
def test_a_card_without_comments(chat, online, touched):
    """One from an older version is replaced. One that was edited since is kept, followed by the generated text."""
    publish(chat, REPO)
    old = (
        card_on_hub(online).replace(f"{BEGIN}\n", "").replace(f"{END}\n", "").replace("A Llama of", "An old Llama of")
    )
    put_on_hub(online, REPO, {"README.md": old.encode()}, title="Publish chat")
    if touched:
        put_on_hub(online, REPO, {"README.md": f"{old}\nMine.\n".encode()}, title="Update README.md")
    publish(chat, REPO)
    card = card_on_hub(online)
    assert ("An old Llama of" in card, "\nMine.\n" in card) == (touched, touched)
    assert card.count(BEGIN) == card.count("\nA Llama of") == 1 and (
        not touched or card.index("Mine.") < card.index(BEGIN)
    )
    assert publish(chat, REPO)[-1].changed == []


def test_a_card_that_was_there_before_the_first_model(chat, online):
    """The web page of the Hub creates one with a license. An explicit license takes precedence."""
    online.storage.create("models", REPO, private=False)
    put_on_hub(online, REPO, {"README.md": b"---\nlicense: mit\n---\n"})
    publish(chat, REPO)
    assert ModelCard(card_on_hub(online)).data.license == "mit" and "# micro\n" in card_on_hub(online)
    publish(chat, REPO, license="apache-2.0")
    assert ModelCard(card_on_hub(online)).data.license == "apache-2.0"


def test_metadata_that_cannot_be_read(chat, online):
    online.storage.create("models", REPO, private=False)
    put_on_hub(online, REPO, {"README.md": b"---\nlicense: [mit\n---\n\nText.\n"})
    with pytest.raises(InputError, match=r"README\.md on the Hub: .* not valid YAML"):
        publish(chat, REPO)
    assert files_on_hub(online, REPO)["main"].keys() == {"README.md"}, "nothing was sent"


@pytest.mark.slow  # the client waits longer before each of its tries
def test_a_card_that_cannot_be_fetched_is_not_taken_for_none(hub, online):
    """It would be overwritten if it was treated as missing."""
    api = HfApi()
    online.storage.create("models", REPO, private=False)
    commit = online.storage.repo("models", REPO)["branches"]["main"]
    assert read_card(api, REPO, commit) is None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # not listening: connections are refused
        api.endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match=api.endpoint), explain_errors(api, REPO):
            read_card(api, REPO, commit)


def test_scores_that_are_gone_leave_the_metadata(chat, online):
    """This includes scores on sample items that an older version published."""
    (chat / "scores.json").write_text(json.dumps(bits_per_byte_scores(["chat"], "data")))
    publish(chat, REPO)
    assert ModelCard(card_on_hub(online)).data.eval_results
    (chat / "scores.json").unlink()
    publish(chat, REPO)
    assert "model-index" not in card_on_hub(online)


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("told", [True, False], ids=["by-the-file", "by-one-task"])
def test_made_up_items_are_no_scores(chat, told, limit):
    """They appear in neither text nor metadata, even if only one task used the sample."""
    from tinyllama_hf.evaluation.tasks.suite import SAMPLE, task_files
    from tinyllama_hf.provenance import file_sha256

    scores = commonsense_scores(["chat"], limit, sample=told)
    (chat / "commonsense.json").write_text(json.dumps(scores | {"protocol": scores["protocol"] | {"sample": False}}))
    assert "hellaswag" in plan_revisions(chat, REPO)[0].files["README.md"].decode()
    if not told:
        scores["protocol"]["data"]["piqa"] = file_sha256(task_files(SAMPLE)["piqa"])
    (chat / "commonsense.json").write_text(json.dumps(scores))
    card = plan_revisions(chat, REPO)[0].files["README.md"].decode()
    assert "hellaswag" not in card and "ommonsense" not in card and "33.00" not in card


class TestMerge:
    """Merging of cards as text, without a Hub."""

    def card(self, text: str = "# new", **metadata) -> str:
        return write_card(metadata, text)

    def test_the_block_of_metadata_stays_as_it_is_written(self):
        """Comments and order are kept if no field changes."""
        before = self.card("# old", tags=["llama"]).replace("tags:", "license: mit  # asked\ntags:")
        after = merge_card(self.card(tags=["llama"]), before)
        assert after == before.replace("# old", "# new")

    def test_fields_of_ours_win_and_those_of_others_stay(self):
        before = self.card(library_name="other", license="mit", date="2026-01-01", tags="one", **{"model-index": [1]})
        after = merge_card(self.card(library_name="peft", tags=["llama"]), before, computed=["model-index"])
        fields = {"library_name": "peft", "license": "mit", "date": "2026-01-01", "tags": ["one", "llama"]}
        assert yaml.safe_load(after.split("---")[1]) == fields
        assert "model-index" in merge_card(self.card(), before), "of a kind that has none from us"

    @pytest.mark.parametrize("text", [f"Mine.\n\n{BEGIN}\n# old\n", f"Mine.\n{END}\n", f"{END}\nMine.\n{BEGIN}"])
    def test_a_comment_without_its_partner_swallows_nothing(self, text):
        after = merge_card(self.card(), f"---\ntags: []\n---\n\n{text}")
        assert "Mine." in after and after.count(BEGIN) == after.count(END) == 1
        assert merge_card(self.card("# newer"), after) == after.replace("# new", "# newer")

    def test_text_after_a_comment_without_its_partner(self):
        before = f"{BEGIN}\nMine.\n\n{BEGIN}\n# old\n{END}\n"
        assert "Mine." in merge_card(self.card(), before)

    def test_signs_that_mean_something_to_regular_expressions(self):
        after = merge_card(self.card(r"\1 \g<0> \n"), self.card("# old"))
        assert r"\1 \g<0> \n" in after
