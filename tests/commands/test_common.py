from argparse import ArgumentParser, Namespace

import pytest

from optimum_zsaq.commands.common import Command, add_common_arguments, size_text, table


class Failing(Command):
    def __init__(self, error, **arguments):
        self.error = error
        self.args = Namespace(**{"json": False, "debug": False, **arguments})

    def execute(self, args):
        if self.error is not None:
            raise self.error
        return {"answer": 42}

    def show(self, result):
        print(f"the answer is {result['answer']}")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("bits=9 is wrong"), 1, "error: bits=9 is wrong"),
        (OSError("no space"), 1, "error: no space"),
        (RuntimeError("boom"), 1, "error: RuntimeError: boom"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_and_a_code(capsys, error, code, text):
    with pytest.raises(SystemExit) as stop:
        Failing(error).run()
    assert stop.value.code == code
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.out == ""


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="bits=9"):
        Failing(ValueError("bits=9"), debug=True).run()


def test_result_for_people_and_as_json(capsys):
    Failing(None).run()
    assert capsys.readouterr().out == "the answer is 42\n"
    Failing(None, json=True).run()
    assert capsys.readouterr().out == '{\n  "answer": 42\n}\n'


def test_common_arguments():
    parser = ArgumentParser()
    add_common_arguments(parser)
    assert vars(parser.parse_args(["--json"])) == {"json": True, "debug": False}


def test_table_aligns_numbers_to_the_right():
    lines = table(("name", "bytes"), [("a", 5), ("long", 12345)]).splitlines()
    assert lines == ["name   bytes", "----  ------", "a          5", "long  12,345"]


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.00 GiB")]
)
def test_size_text(count, text):
    assert size_text(count) == text
