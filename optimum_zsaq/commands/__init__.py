from .zsaq import ZSAQCommand
