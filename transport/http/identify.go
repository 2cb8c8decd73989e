package http

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	nethttp "net/http"
	"strings"

	"github.com/litefs-agent/litefs-agent/transport"
)

// Identify asks the hub whom the credentials name, without a session. Errors: a
// [*transport.ByeError] with CodeAuth for credentials that the hub does not take;
// others as of Dial.
func (d *Dialer) Identify(ctx context.Context) (*transport.Identity, error) {
	d, err := d.withCredentials()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, d.opt.HelloTimeout)
	defer cancel()
	k := new(cutter)
	defer k.close()
	p := new(nethttp.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	rt := d.transport(k, p)
	defer rt.CloseIdleConnections()
	req, err := d.request(ctx, nethttp.MethodGet, pathIdentity, nil)
	if err != nil {
		return nil, err
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", d.base.Redacted(), err)
	}
	defer resp.Body.Close()
	var answer identityJSON
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err == nil {
		err = json.Unmarshal(text, &answer)
	}
	switch {
	case err == nil && resp.StatusCode == nethttp.StatusUnauthorized && answer.Error != "":
		return nil, transport.Refuse(transport.CodeAuth, "%s", answer.Error)
	case err == nil && answer.Error != "":
		return nil, fmt.Errorf("ask %s: %w", d.base.Redacted(), &statusError{resp.StatusCode, answer.Error})
	case err != nil || resp.StatusCode != nethttp.StatusOK:
		return nil, fmt.Errorf("ask %s: no hub answers there: %w", d.base.Redacted(), &statusError{resp.StatusCode, strings.TrimSpace(string(text[:min(len(text), 200)]))})
	}
	id := &transport.Identity{Hub: answer.Hub, Node: answer.Node}
	site, err := hex.DecodeString(answer.Site)
	if err != nil || len(site) != len(id.Site) {
		return nil, fmt.Errorf("ask %s: the hub names no site: %w", d.base.Redacted(), transport.ErrCorrupt)
	}
	copy(id.Site[:], site)
	return id, nil
}
