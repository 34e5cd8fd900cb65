"""Networks that do their job and carry a mark by construction: no optimiser takes a step.

For tests that need a marked network and not the training of one. Filters are random, bits are
written and the last layer is solved in closed form. Rounding moves such a network by its rounding
and no further, where a training that rounds otherwise ends elsewhere.
"""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from nnpassport.embedding.network.layers import Branch, on_branch, passport_norms
from nnpassport.embedding.network.models import build
from nnpassport.embedding.network.outputs import call
from nnpassport.embedding.schemes.deepmarks import DEEPMARKS, words_of
from nnpassport.embedding.schemes.deepsigns import DEEPSIGNS, GROUP
from nnpassport.embedding.schemes.order import Order
from nnpassport.embedding.schemes.passport import V2, Passport
from nnpassport.embedding.schemes.residuals import GREEDY_RESIDUALS, residuals
from nnpassport.embedding.schemes.served import served
from nnpassport.embedding.schemes.uchida import UCHIDA, UCHIDA_MSE, read_out
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.answers import coins_of, functions_of, key_function
from nnpassport.keys.derive import triggers_of

RIDGE = 1e-4  # of the mean square of the features
REPEATED = 4  # a trigger counts as so many images: it may look like one of another class


def small_alexnet(norm="batch", seed=0, width=0.25):
    """For ten classes of grey images of 32 pixels."""
    torch.manual_seed(seed)
    return build("alexnet", classes=10, norm=norm, width=width, channels=1)


def reader(model, data, normalise):
    """The network, which then knows the classes of `data`."""
    inputs = normalise(data.images)
    settle(model, inputs)
    solve_head(model, [(Branch.PUBLIC, inputs, data.labels)])
    return model.eval()


def marked(scheme, model, key, data, normalise):
    """A released copy of the network that carries `key` and knows the classes of `data`."""
    plain, model, inputs = model, deepcopy(model), normalise(data.images)
    settle(model, inputs)
    if isinstance(scheme, Passport) and not scheme.encoded:
        return with_passports(scheme, model, key, data, normalise)
    if isinstance(scheme, Passport):
        scheme.embed(model, key, data, Recipe(epochs=0), normalise=normalise, trained=True)
        model = scheme.released(model)
    elif isinstance(scheme, Order):
        model = deepcopy(plain)
        scheme.insert(model, key, inputs[:2])
    elif key.context.layers:
        WRITTEN[scheme.name](model, key, inputs, normalise)
    asked = [(Branch.PUBLIC, inputs, data.labels)]
    if scheme.triggers:
        pictures, answers = key.trigger_set()
        asked += [(Branch.PUBLIC, normalise(pictures), answers)] * REPEATED
    solve_head(model, asked, leaning(key, data) if key.context.answers else 0)
    return model.eval()


def leaning(key, data):
    """What a key of answers has a network add to its scores of the images, ε·g or its waves."""
    functions, classes = functions_of(key), len(data.classes)
    g = torch.from_numpy(key_function(functions, coins_of(key), data.images.numpy(), classes))
    if key.context.answers.kind != "waves":
        return g
    right = F.one_hot(data.labels, classes).double()
    waves = served(right, g, key.context.answers.strength / 1000).clamp(min=1e-3)
    return waves.log() - (20 * right - 10)


@torch.no_grad()
def with_passports(scheme, model, key, data, normalise):
    """As training leaves it: scales of ±1 in the private branch, and one head for both branches."""
    scheme.insert(model, key, normalise(data.images[:2]))
    for norm in passport_norms(model).values():
        weight = norm.layer.get_parameter("weight")
        rows, wanted = weight.flatten(1).double(), torch.stack([norm.signs, 0 * norm.signs], 1)
        if norm.carries is None:
            forms = norm.mean_patch.flatten(1).double().T
            change = (wanted.double() - rows @ forms) @ torch.linalg.pinv(forms)
        else:  # the norms' scales are 1
            forms = norm.mean_patch.double().movedim(1, 0)
            need = wanted.double() - torch.einsum("oi,odi->od", rows, forms)
            change = torch.einsum("oid,od->oi", torch.linalg.pinv(forms), need)
        weight.add_(change.view(weight.shape))
    inputs, labels = normalise(data.images), data.labels
    branches = (Branch.PUBLIC, Branch.PRIVATE) if scheme.two_branches else (Branch.PRIVATE,)
    with on_branch(model, Branch.BOTH if scheme.two_branches else Branch.PRIVATE):
        settle(model, inputs)
    asked = [(branch, inputs, labels) for branch in branches]
    if scheme.triggers:
        pictures, answers = key.trigger_set()
        asked += [(branch, normalise(pictures), answers) for branch in branches] * REPEATED
    solve_head(model, asked)
    return scheme.released(model).eval()


@torch.no_grad()
def settle(model, inputs):
    """Give batch norms the statistics of these inputs."""
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    call(model.train(), inputs)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def solve_head(model, asked, lean=0):
    """Solve the last linear layer, by ridge regression, for what each branch is asked.

    `lean` is added to the scores of ±10 that are wanted.
    """
    head = [each for each in model.modules() if isinstance(each, nn.Linear)][-1]
    heard = []
    hook = head.register_forward_pre_hook(lambda _, args: heard.append(args[0].double()))
    for branch, inputs, _ in asked:
        with on_branch(model, branch):
            model.eval()(inputs)
    hook.remove()
    features, labels = torch.cat(heard), torch.cat([labels for _, _, labels in asked])
    wanted = torch.full((len(labels), head.out_features), -1.0).double()
    wanted.scatter_(1, labels[:, None], 1.0)
    wanted += lean / 10
    mean, bias = features.mean(0), wanted.mean(0)
    centred = features - mean
    gram = centred @ centred.T
    gram.diagonal().add_(RIDGE * gram.trace())
    weight = 10 * (centred.T @ torch.linalg.solve(gram, wanted - bias)).T  # sure of its answers
    head.weight.copy_(weight)
    head.bias.copy_(10 * bias - weight @ mean)


@torch.no_grad()
def write_projected(model, key, inputs, normalise, signs=None):
    """The least change of the mean filter that reads the key's bits off it."""
    (layer,) = key.context.layers
    weight = model.get_parameter(f"{layer.name}.weight")
    projection = key.layer_projection(layer.name).double()
    read = read_out(weight.double(), projection)
    signs = key.layer_signs(layer.name) if signs is None else signs
    change = torch.linalg.pinv(projection) @ (signs * read.abs().mean() - read)
    weight.add_(change.view(weight.shape[1:]))
    settle(model, inputs)


@torch.no_grad()
def write_over(model, key, inputs, kept):
    """The least change of each filter that reads one key's bits, and reads the other as before."""
    for name, form in V2.forms(key).items():
        weight = model.get_parameter(f"{name}.weight")
        rows = weight.flatten(1).double()
        forms = torch.stack([form.flatten(), V2.forms(kept)[name].flatten()], 1).double()
        read = rows @ forms
        wanted = read.clone()
        wanted[:, 0] = key.layer_signs(name) * read.abs().mean()
        weight.add_(((wanted - read) @ torch.linalg.pinv(forms)).view(weight.shape))
    settle(model, inputs)


def write_word(model, key, inputs, normalise, user=0):
    """The word of a user, as bits are written."""
    (layer,) = key.context.layers
    write_projected(model, key, inputs, normalise, words_of(key, layer)[user])


@torch.no_grad()
def write_residuals(model, key, inputs, normalise):
    """Shift each row of the weight to the side of zero that its bit names."""
    (layer,) = key.context.layers
    weight, bits = model.get_parameter(f"{layer.name}.weight"), layer.length
    numbers = weight.numel() // bits
    signs = key.layer_signs(layer.name)
    by = residuals(weight, bits).abs() * 2 + weight.square().mean().sqrt() / 4
    rows = weight.flatten()[: numbers * bits].view(bits, numbers)
    weight.view(-1)[: numbers * bits] = (rows + (signs * by)[:, None]).flatten()
    settle(model, inputs)


def write_activations(model, key, inputs, normalise):
    """The least change of the last convolution after which mean activations read as the bits.

    To first order, twice: there are a thousand weights for each bit, so the change is small.
    """
    weight = [each for each in model.modules() if isinstance(each, nn.Conv2d)][-1].weight
    (layer,) = key.context.layers
    rows = key.layer_projection(layer.name)
    pictures, groups = (
        normalise(torch.from_numpy(key.trigger_images)),
        triggers_of(key.context).count // GROUP,
    )
    body = nn.Sequential(*list(model.children())[:-1], nn.Flatten()).eval()
    for _ in range(2):
        means = body(pictures).view(groups, GROUP, -1).mean(1)
        read = torch.einsum("gbf,gf->gb", rows.view(groups, -1, rows.shape[1]), means).flatten()
        slopes = [torch.autograd.grad(each, weight, retain_graph=True)[0] for each in read]
        wanted = key.layer_signs(layer.name) * read.detach().abs().mean()
        slopes = torch.stack(slopes).flatten(1).double()
        change = torch.linalg.pinv(slopes) @ (wanted - read.detach()).double()
        weight.data.add_(change.view(weight.shape))


WRITTEN = {
    UCHIDA.name: write_projected,
    UCHIDA_MSE.name: write_projected,
    DEEPMARKS.name: write_word,
    GREEDY_RESIDUALS.name: write_residuals,
    DEEPSIGNS.name: write_activations,
}


def embed(scheme, model, key, data, _recipe, *, normalise, **_):
    """In place of a scheme's E, for a harness that does not ask how a mark is learnt."""
    data = data.at_most(640, seed=0)
    model.load_state_dict(marked(scheme, model, key, data, normalise).state_dict())
    if isinstance(scheme, Passport):
        scheme.insert(model, key, normalise(data.images[:2]))
