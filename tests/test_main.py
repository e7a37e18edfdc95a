import subprocess
import sys

import pytest

from pathfm.__main__ import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([verb, "--help"])
    assert leaving.value.code == 0
    assert f"pathfm {verb}" in capsys.readouterr().out.replace("pretrain.py", f"pathfm {verb}")


def test_an_unknown_verb_is_one_line_and_the_usage(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'" in capsys.readouterr().err
    assert main([]) == 0
    assert "usage: pathfm VERB" in capsys.readouterr().out


def test_light_verbs_start_without_torch():
    code = "import sys; from pathfm.__main__ import main; main(['config', 'vitl14']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_reader_that_has_read_enough_is_no_accident():
    command = [sys.executable, "-m", "pathfm", "config", "vitl14"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
