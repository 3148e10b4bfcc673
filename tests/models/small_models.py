"""Real models at small sizes: built from their configurations, each with one fixed batch.

A case's `build` gives a model and a function of it, the loss on the batch. There is no dropout, as
two runs are compared.
"""

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, CLASSES = 64, 10


def _tokens(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, shape, generator=generator)


def _images(size, count=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def _classifies(model, size):
    images, labels = _images(size)
    return model, lambda model: F.cross_entropy(model(images), labels)


def _configured(auto, kind, **config):
    """A model of transformers that gives its own loss."""
    import transformers

    settings = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=0, **config
    )
    model = getattr(transformers, auto).from_config(settings).train()
    tokens = _tokens(8, 16)
    return model, lambda model: model(input_ids=tokens, labels=tokens).loss


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def gpt2():
    return _configured(
        "AutoModelForCausalLM", "gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def llama():
    return _configured("AutoModelForCausalLM", "llama", num_key_value_heads=1, **SMALL)


def mixtral():
    return _configured(
        "AutoModelForCausalLM", "mixtral", num_key_value_heads=1, num_local_experts=4, **SMALL
    )


def bert():
    return _configured(
        "AutoModelForMaskedLM", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **SMALL,
    )  # fmt: skip


def t5():
    return _configured(
        "AutoModelForSeq2SeqLM", "t5", d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip


def vit_torchvision():
    from torchvision.models import VisionTransformer

    return _classifies(
        VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
            num_classes=CLASSES,
        ),
        16,
    )  # fmt: skip


def vit_timm():
    from timm.models.vision_transformer import VisionTransformer

    return _classifies(
        VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2,
            num_classes=CLASSES,
        ),
        16,
    )  # fmt: skip


def swin_torchvision():
    from torchvision.models import SwinTransformer

    return _classifies(
        SwinTransformer(
            patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4],
            mlp_ratio=2, stochastic_depth_prob=0.0, num_classes=CLASSES,
        ),
        16,
    )  # fmt: skip


def swin_timm():
    from timm.models.swin_transformer import SwinTransformer

    return _classifies(
        SwinTransformer(
            img_size=16, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 2),
            window_size=4, mlp_ratio=2, drop_path_rate=0.0, num_classes=CLASSES,
        ),
        16,
    )  # fmt: skip


def resnext():
    from timm.models.resnet import Bottleneck, ResNet

    return _classifies(
        ResNet(
            Bottleneck, [1, 1, 1, 1], channels=(8, 16, 32, 64), stem_width=8, cardinality=4,
            base_width=16, num_classes=CLASSES,
        ),
        32,
    )  # fmt: skip


def efficientnet():
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    # Expansion, kernel, stride, channels in and out, layers.
    blocks = [
        MBConvConfig(1, 3, 1, 16, 16, 1, 1.0, 1.0),
        MBConvConfig(4, 3, 2, 16, 24, 2, 1.0, 1.0),
        MBConvConfig(4, 5, 2, 24, 40, 1, 1.0, 1.0),
    ]
    model = EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES)
    return _classifies(model, 32)


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.after = nn.ModuleList()
        for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            self.down.append(self.block(inputs, outputs))
        for outputs in (2 * width, width):
            self.up.append(nn.ConvTranspose2d(2 * outputs, outputs, 2, stride=2))
            self.after.append(self.block(2 * outputs, outputs))
        self.head = nn.Conv2d(width, 3, 1)

    @staticmethod
    def block(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, images):
        seen = []
        for block in self.down:
            images = block(F.max_pool2d(images, 2) if seen else images)
            seen.append(images)
        for up, after, skip in zip(self.up, self.after, seen[-2::-1], strict=True):
            images = after(torch.cat([skip, up(images)], dim=1))
        return self.head(images)


def unet():
    images, _ = _images(16)
    # Of each pixel, whether a channel is above the mean of its neighbours.
    labels = (images > F.avg_pool2d(images, 3, 1, 1)).float()
    return UNet(), lambda model: F.binary_cross_entropy_with_logits(model(images), labels)


def gcn():
    from torch_geometric.nn import GCN

    generator = torch.Generator().manual_seed(1)
    nodes = torch.randn(64, 16, generator=generator)
    edges = torch.randint(64, (2, 256), generator=generator)
    labels = torch.randint(CLASSES, (64,), generator=generator)
    model = GCN(16, 32, 2, CLASSES)
    return model, lambda model: F.cross_entropy(model(nodes, edges), labels)


def _adapted(**options):
    import peft

    model, loss_of = llama()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, **options)
    return peft.get_peft_model(model, config), loss_of


def lora():
    return _adapted()


def dora():
    return _adapted(use_dora=True)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 2, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source, target):
        return self.head(self.transformer(self.embed(source), self.embed(target)))


def transformer():
    tokens = _tokens(8, 24)
    source, target, labels = tokens[:, :12], tokens[:, 12:-1], tokens[:, 13:]
    return Translator(), lambda model: F.cross_entropy(
        model(source, target).flatten(0, 1), labels.flatten()
    )


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


def lstm():
    tokens = _tokens(16, 12)
    labels = _tokens(16) % CLASSES
    return LSTMClassifier(), lambda model: F.cross_entropy(model(tokens), labels)
