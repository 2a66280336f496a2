"""Further towers of open_clip's models: EVA-CLIP's, the Perception Encoder's, timm's Swin, CLIPA's, MetaCLIP 2's."""
