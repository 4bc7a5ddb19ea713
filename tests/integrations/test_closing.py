"""What a finished training says must follow from what was measured."""

from optimum_zsaq.integrations.closing import kept_line, won_lines


def recipe(kept: str, worse: dict[str, list[str]], **more) -> dict:
    def figures(output: float, agreement: float) -> dict:
        return {"discrepancy": 1.0, "output": output, "agreement": agreement}

    won = {
        "rounded": {"single text": figures(0.4, 0.5), "pair, related": figures(0.2, 0.7)},
        "step 9": {"single text": figures(0.3, 0.6), "pair, related": figures(0.1, 0.8)},
        "trained": {"single text": figures(0.1, 0.9), "pair, related": figures(0.5, 0.4)},
    }
    return {"count": 1234, "seconds": 5, "kept": kept, "worse": worse, "won": won, **more}


def test_a_line_a_form_of_the_state_that_is_kept():
    lines = won_lines(recipe("step 9", {"trained": ["pair, related"]}))
    assert lines[0] == (
        "single text: distance from the float model 0.4000 rounded, 0.3000 now; equal answers 50.0 %, now 60.0 %"
    )
    assert lines[1].startswith("pair, related: distance from the float model 0.2000 rounded, 0.1000 now")
    assert lines[2] == "kept: the state 'step 9', because trained was worse than rounding on 'pair, related'"
    assert lines[3].startswith("1,234 generated sequences, 5 s")


def test_of_a_model_without_outputs():
    data = recipe("trained", {"trained": []})
    for found in data["won"].values():
        for figures in found.values():
            del figures["output"], figures["agreement"]
    assert won_lines(data)[0] == "single text: distance from the float model 1.0000 rounded, 1.0000 now"


def test_why_training_was_given_up():
    worse = {"step 9": ["single text"], "trained": ["single text", "pair, related"]}
    assert kept_line(recipe("rounded", worse)) == (
        "kept: rounding, nothing of the training, because step 9 was worse than rounding on 'single text'; "
        "trained was worse than rounding on 'single text' and 'pair, related'"
    )
    assert "training stopped (it is NaN)" in kept_line(recipe("rounded", {}, stopped="it is NaN"))
    assert "because no other state was clearly nearer to the float model" in kept_line(recipe("rounded", {"trained": []}))


def test_a_state_that_is_worse_and_kept_says_so():
    """Without the guard."""
    assert kept_line(recipe("trained", {"trained": ["pair, related"]})) == (
        "kept: the trained model, which is worse than rounding on 'pair, related'"
    )
    assert kept_line(recipe("trained", {"trained": []})) == "kept: the trained model"
