# %% [markdown]
# # A tour of sslops
# On 1,797 digits of 8 x 8 pixels, in seconds: `python examples/tour.py`, or cell by cell in an editor or Jupyter.

# %%
import matplotlib.pyplot as plt
import torch
from methods import augment, conv_encoder, mlp
from sklearn.datasets import load_digits
from torch import nn

import sslops

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
held_out = torch.arange(len(images)) % 4 == 0

# %% [markdown]
# What runs here, and why not something else

# %%
print(sslops.explain("nt_xent", torch.randn(512, 64), torch.randn(512, 64)))

# %% [markdown]
# ## SimCLR
# Two views of each image, an encoder, and `nt_xent`; beside them a momentum encoder, as in BYOL, by `EMA`.

# %%
encoder, features = conv_encoder(8)
model = nn.Sequential(encoder, mlp(features, 128, 64))
average, _ = conv_encoder(8)
average.load_state_dict(encoder.state_dict())
ema = sslops.EMA(average, encoder, momentum=0.95)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)


def neighbours_agree(network: nn.Module) -> float:
    """How many held-out images have the label of their nearest image among the others"""
    with torch.no_grad():
        z = nn.functional.normalize(network.eval()(images))
    nearest = (z[held_out] @ z[~held_out].T).argmax(1)
    network.train()
    return (labels[~held_out][nearest] == labels[held_out]).float().mean().item()


before, losses, tops = neighbours_agree(encoder), [], []
for _ in range(40):
    batch = images[torch.randint(len(images), (512,))]
    z0, z1 = model(augment(torch.cat([batch, batch]))).chunk(2)
    loss, metrics = sslops.nt_xent(z0, z1, temperature=0.2, return_metrics=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.step()
    losses.append(loss.item())
    tops.append(metrics.top1.item())

after, averaged = neighbours_agree(encoder), neighbours_agree(average)
print(f"the nearest image has the same label: untrained {before:.0%}, trained {after:.0%}, its average {averaged:.0%}")

# %% [markdown]
# ## The same embeddings under other losses
# Each is one line, and `backend="eager"` is the same value in plain PyTorch.

# %%
z0, z1 = z0.detach(), z1.detach()
for name, loss in {
    "nt_xent": lambda **k: sslops.nt_xent(z0, z1, temperature=0.2, **k),
    "info_nce": lambda **k: sslops.info_nce(z0, z1, temperature=0.2, **k),
    "barlow_twins": lambda **k: sslops.barlow_twins(z0, z1, **k),
    "vicreg": lambda **k: sslops.vicreg(z0, z1, **k),
}.items():
    print(f"{name:<14}{loss():10.5f}  eager {loss(backend='eager'):10.5f}")

# %% [markdown]
# ## MAE's masks
# A quarter of the patches is cut out; the others are mask tokens in the decoder's input.

# %%
ids_keep, mask, ids_restore = sslops.random_mask(8, 16, 0.75)
patches = sslops.gather_patches(images[:8], ids_keep, 2)  # [8, 4, 4]: four patches of 2 x 2 pixels
seen = sslops.restore_tokens(patches, torch.full((4,), 0.5), ids_restore)
seen = seen.view(8, 4, 4, 2, 2).transpose(2, 3).reshape(8, 8, 8)

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
axes[0].plot(losses)
axes[0].set(title="SimCLR's loss", xlabel="step")
axes[1].plot(tops)
axes[1].set(title="the other view is the nearest of 1,023", xlabel="step", ylim=(0, 1))
axes[2].imshow(torch.cat([torch.cat(list(images[:8, 0]), 1), torch.cat(list(seen), 1)]).numpy(), cmap="gray")
axes[2].set(title="images, and what MAE's encoder sees")
axes[2].axis("off")
plt.show()
