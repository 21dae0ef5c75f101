"""placeholder so that the registry loads while the pass is being written"""
