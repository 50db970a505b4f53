class HFEngine: 
    pass
