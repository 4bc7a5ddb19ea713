class ZSAQCommand: pass
