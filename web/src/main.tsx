import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { mount } from "./mount";

// The page and its RPCs have one origin.
mount(createGrpcWebTransport({ baseUrl: window.location.origin, useBinaryFormat: true }));
