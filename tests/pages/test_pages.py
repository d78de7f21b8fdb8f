"""Every command of every page is run, with the exceptions of tables.py."""

from __future__ import annotations

import pytest

from tests.helpers.pages.blocks import TOP, Block, blocks, pages
from tests.helpers.pages.user import User
from tests.pages.tables import ADDED, BEFORE, REFUSES, STAND_INS

BLOCKS = {page: list(blocks((TOP / page).read_text())) for page in pages()}
_FOLLOWED: dict[str, str] = {}


def follow(user: User, page: str) -> str:
    """Run a page from top to bottom, once; return its first failure, or ""."""
    if page not in _FOLLOWED:
        if page in BEFORE:
            assert not follow(user, BEFORE[page])
        _FOLLOWED[page] = _fault(user, page)
    return _FOLLOWED[page]


def _fault(user: User, page: str) -> str:
    for block in BLOCKS[page]:
        ran = user.follow(block)
        if ran.returncode:
            return (
                f"{page}, line {block.line}: exit code {ran.returncode}\n{block.text}\n{ran.stdout}"
            )
    return ""


@pytest.mark.parametrize("page", [page for page, content in BLOCKS.items() if content])
def test_every_command_of_the_page_runs(user: User, page: str) -> None:
    if fault := follow(user, page):
        pytest.fail(fault, pytrace=False)


@pytest.mark.parametrize(
    "command",
    [
        "linearsr upscale photo.jpg -o big.png --stepz 2",
        "linearsr upscale gone.jpg -o big.png",
        "linearsr serve --layout splits",
        "linearsr job gone",
        "linearsr job upscale-dataset --submit --input PHOTOS --outputs there",
        "python ray_jobs/gone.py",
        "python ray_jobs/pretrain.py --recipes tiny_cpu --data PHOTOS",
        "ray job submit --working-dir . -- python ray_jobs/deploy.py --sets replicas=2",
        "ray job submitt --working-dir . -- python ray_jobs/deploy.py",
        "ray up gone.yaml",
        "ray up cluster.yaml --yess",
        "ray dashboard gone.yaml &",
        "ray exec cluster.yaml 'ray statuss'",
        "serve deploy ray_jobs/serve.yaml --addresses there",
        "curl http://127.0.0.1:8000/gone",
        "python -m pytest tests/gone",
        "python -m linearsr.distributed.health --nodes 4",
        "python -m benchmarks --device cuda --onlyy gains",
        "pip install '.[gone]'",
        "make gone",
        "docker build -f deploy/Dockerfile -t example.com/linearsr:0.0.0 .",
        "docker build -f deploy/Dockerfile -t example.com/linearsr:0.1.0-ray2.60.0 gone",
        "kubectl apply -f deploy/kubernetes/gone.yaml",
        "kubectl apply -k deploy/kubernetes/gone",
        "kubectl get rayjob gone",
        "kubectl logs -l ray.io/cluster=linearsr,ray.io/group=gpu -c gone",
        "kubectl logs -l ray.io/cluster=linearsr,ray.io/group=gone -c health",
        "kubectl port-forward service/gone-head-svc 8265",
        "helm install operator kuberay/operator --versions 1.7.0",
        "aws ssm get-parameter --names gone",
        "aws cloudformation wait stack-create-completed --stack-name linearsr",
        "aws cloudformation create-stack --stack-name linearsr --template-body file://deploy/aws/gone.yaml",
        "aws cloudformation create-stack --template-body file://deploy/aws/account.yaml "
        "--stack-name linearsr --parameters ParameterKey=Bucket,ParameterValue=BUCKET",
        "aws s3 sync gone s3://BUCKET/in",
        "kubectl wait rayservice/linearsr-endpoint --for=condition=HeadPodReady",
        "cowsay hello",
    ],
)
def test_a_wrong_command_fails(user: User, command: str) -> None:
    (block,) = blocks(f"# A page\n\n```sh\n{command}  # says who?\necho and on it goes\n```\n")
    ran = user.follow(block)
    assert ran.returncode != 0, ran.stdout


def test_wrong_python_fails(user: User) -> None:
    assert user.follow(Block("python", "from linearsr import Upscalers\n", 1)).returncode != 0


@pytest.mark.parametrize(
    "hidden", ["```bash\nlinearsr models\n```", "    linearsr models\n", "```\nray up it\n```"]
)
def test_blocks_refuses_commands_outside_sh_and_python_fences(hidden: str) -> None:
    with pytest.raises(ValueError, match="line 1: commands are in"):
        list(blocks(hidden))


def test_every_row_of_the_tables_names_a_command_of_a_page() -> None:
    text = "\n".join(block.text for content in BLOCKS.values() for block in content)
    for command in (*ADDED, *REFUSES, *STAND_INS):
        assert f"{command} " in text, command
    assert len(BLOCKS) > 25 and sum(map(len, BLOCKS.values())) > 40
