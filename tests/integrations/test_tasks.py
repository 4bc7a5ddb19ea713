"""Which class a task or a checkpoint is loaded with."""

import pytest
import transformers as tf
from tiny_models import MODELS, make

from optimum_zsaq.integrations.tasks import TASKS, load_config, model_class


@pytest.mark.parametrize("name", MODELS)
def test_class_of_a_checkpoint(tmp_path, name):
    make(name).save_pretrained(tmp_path)
    assert model_class(load_config(str(tmp_path))) is MODELS[name][0]


@pytest.mark.parametrize("task", TASKS)
def test_class_of_a_task(task):
    cls = model_class(tf.BertConfig(), task)
    assert cls.__name__ == TASKS[task]
    assert cls.__name__.startswith("AutoModel")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"task='translation' is unknown; use one of \['feature-extraction'"):
        model_class(tf.BertConfig(), "translation")
    for architectures in (None, [], ["MyBert"], ["BertConfig"]):
        with pytest.raises(ValueError, match="names no architecture that transformers has.*name its task, one of"):
            model_class(tf.BertConfig(architectures=architectures))
    with pytest.raises(ValueError, match="there is no model at .*give a folder with config.json"):
        load_config(str(tmp_path / "missing"))
