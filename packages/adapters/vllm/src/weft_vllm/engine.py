from weft_vllm.compat import WeightTransferEngine,WeightTransferInitInfo,WeightTransferUpdateInfo
class WeftWeightTransferEngine(WeightTransferEngine):
    init_info_cls=WeightTransferInitInfo
    update_info_cls=WeightTransferUpdateInfo
    def init_transfer_engine(self, i): pass
    def start_weight_update(self): pass
    def finish_weight_update(self): pass
    def receive_weights(self,u): pass
    def shutdown(self): pass
