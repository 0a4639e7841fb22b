"""Scans and attention as functions on tensors: one folder an operation, one file a backend."""

from .attention import attention as attention
from .conv import short_convolution as short_convolution
from .conv import short_convolution_step as short_convolution_step
from .delta import delta_rule as delta_rule
from .delta import delta_rule_step as delta_rule_step
from .delta.product import delta_product as delta_product
from .delta.product import delta_product_step as delta_product_step
from .dplr import generalized_delta_rule as generalized_delta_rule
from .dplr import generalized_delta_rule_step as generalized_delta_rule_step
from .linear import linear_recurrence as linear_recurrence
from .linear import linear_recurrence_step as linear_recurrence_step
from .long_conv import long_convolution as long_convolution
from .long_conv import long_convolution_step as long_convolution_step
from .rnn import gated_rnn as gated_rnn
from .rnn import gated_rnn_step as gated_rnn_step
from .scan import elementwise_scan as elementwise_scan
from .scan import elementwise_scan_step as elementwise_scan_step
from .scan import logcumsumexp as logcumsumexp
from .scan import logsumexp_scan as logsumexp_scan
from .scan import logsumexp_scan_step as logsumexp_scan_step
from .scan import max_plus_scan as max_plus_scan
from .selective import selective_scan as selective_scan
from .selective import selective_scan_step as selective_scan_step
from .ttt import ttt_linear as ttt_linear
from .ttt import ttt_linear_step as ttt_linear_step
