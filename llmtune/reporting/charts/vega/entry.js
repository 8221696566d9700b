// What the pages use of Vega, without maps, trees, word clouds and network loaders.
import { transforms } from "vega-dataflow";
import * as encode from "vega-encode";
import { compile } from "vega-lite";
import { expressionInterpreter } from "vega-interpreter";
import { parse } from "vega-parser";
import { Handler } from "vega-tooltip";
import * as tx from "vega-transforms";
import { View } from "vega-view";
import * as vtx from "vega-view-transforms";

Object.assign(transforms, tx, vtx, encode);
export { Handler, View, compile, expressionInterpreter, parse };
